//! Gives `libcorelane.so` its name inside, so that programs linked against it look for that name.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcorelane.so");
}
