//! The second process of a test: does what its standard input says, one command a line, and answers each with a line.

fn main() {
    corelane_nixl_tests::run_script();
}
