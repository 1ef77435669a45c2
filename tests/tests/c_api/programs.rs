//! The header, the shared library and C programs that use both.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::program::{C11, Compiler, Folder, execute, include, library, root, text};

const CPP17: Compiler = Compiler { command: "c++", language: &["-x", "c++", "-std=c++17"] };

fn example() -> PathBuf {
    root().join("plugin/examples/kv_fetch.c")
}

fn own_source(name: &str) -> PathBuf {
    root().join("tests/tests/c_api").join(name)
}

/// Every function that the header declares.
fn declared() -> BTreeSet<String> {
    let header = std::fs::read_to_string(include().join("corelane.h")).unwrap();
    header
        .lines()
        .filter(|line| !line.starts_with([' ', '*', '/']))
        .filter_map(|line| {
            let (before, _) = line.split_once('(')?;
            let name = before.rsplit([' ', '*']).next()?;
            name.starts_with("corelane_").then(|| name.to_owned())
        })
        .collect()
}

#[test]
fn the_header_stands_alone_in_every_language() {
    let folder = Folder::new("header");
    let source = folder.0.join("only.c");
    // Twice: it is guarded.
    let code = "#include <corelane.h>\n#include <corelane.h>\nint unit_is_not_empty;\n";
    std::fs::write(&source, code).unwrap();
    let object = folder.0.join("only.o");
    let languages: [(&str, &[&str]); 7] = [
        ("cc", &["-std=c99"]),
        ("cc", &["-std=c11"]),
        ("cc", &["-std=gnu17"]),
        ("c++", &["-x", "c++", "-std=c++11"]),
        ("c++", &["-x", "c++", "-std=c++17"]),
        ("c++", &["-x", "c++", "-std=c++20"]),
        ("c++", &["-x", "c++", "-std=gnu++17"]),
    ];
    for (command, language) in languages {
        let flags = ["-Wconversion", "-Wshadow", "-Wundef", "-c"].map(Path::new);
        let files: [&Path; 3] = [&source, "-o".as_ref(), &object];
        Compiler { command, language }.run(&[&flags[..], &files[..]].concat());
    }
}

#[test]
fn statuses_and_structures_are_what_a_c_compiler_makes_of_them() {
    use corelane_capi::*;
    let folder = Folder::new("layout");
    let source = folder.0.join("layout.c");
    let mut code = String::from("#include <corelane.h>\n#include <stddef.h>\n");
    macro_rules! structure {
        ($($name:ident { $($field:ident),* })*) => {$(
            let size = size_of::<$name>();
            code += &format!("_Static_assert(sizeof({0}) == {size}, \"{0}\");\n", stringify!($name));
            $(
                let offset = std::mem::offset_of!($name, $field);
                code += &format!(
                    "_Static_assert(offsetof({0}, {1}) == {offset}, \"{0}.{1}\");\n",
                    stringify!($name), stringify!($field),
                );
            )*
        )*};
    }
    structure! {
        corelane_option { name, value }
        corelane_option_info { name, default_value, description }
        corelane_region_info { addr, len, kind, device, access, reserved }
        corelane_local_segment { addr, len, region }
        corelane_remote_segment { desc, addr, len }
        corelane_local_blocks { base, stride, block_bytes, indices, count }
        corelane_remote_blocks { desc, base, stride, block_bytes, indices, count }
        corelane_engine_stats { posted, bytes_read, links_up, lanes }
        corelane_peer_stats { connected, lane, in_flight, unacknowledged, unacknowledged_bytes }
    }
    let pairs = [
        ("CORELANE_OK", corelane_status::CORELANE_OK),
        ("CORELANE_IN_PROGRESS", corelane_status::CORELANE_IN_PROGRESS),
        ("CORELANE_ERR_NOT_POSTED", corelane_status::CORELANE_ERR_NOT_POSTED),
        ("CORELANE_ERR_BUSY", corelane_status::CORELANE_ERR_BUSY),
        ("CORELANE_ERR_BACKEND", corelane_status::CORELANE_ERR_BACKEND),
        ("CORELANE_ERR_NOT_SUPPORTED", corelane_status::CORELANE_ERR_NOT_SUPPORTED),
    ];
    for (name, status) in pairs {
        code += &format!("_Static_assert({name} == {}, \"{name}\");\n", status as i32);
    }
    code += "_Static_assert(sizeof(corelane_status) == 4, \"a status\");\n";
    std::fs::write(&source, code).unwrap();
    C11.run(&["-c".as_ref(), &source, "-o".as_ref(), &folder.0.join("layout.o")]);
}

#[test]
fn the_library_exports_the_functions_of_the_header_and_nothing_else() {
    let declared = declared();
    assert!(declared.len() > 40 && declared.contains("corelane_engine_create"), "{declared:?}");
    let output = Command::new("nm")
        .args(["--dynamic", "--defined-only", "--format=posix"])
        .arg(library().join("libcorelane.so"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output).1);
    let exported: BTreeSet<String> = text(&output)
        .0
        .lines()
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect();
    assert_eq!(exported, declared);
}

#[test]
fn the_example_fetches_blocks_between_two_processes() {
    let folder = Folder::new("example");
    for compiler in [C11, CPP17] {
        let program = compiler.build(&example(), &folder);
        let output = execute(&program, &[], &[("CORELANE_LOG_LEVEL", "warn")]);
        let (told, complaints) = text(&output);
        assert!(output.status.success(), "{complaints}");
        assert_eq!(complaints, "", "warnings of a run without a fault");
        let words: Vec<&str> = told.split_whitespace().collect();
        assert_eq!(words[..6], ["fetched", "256", "blocks", "of", "64", "KiB"], "{told}");
        assert_eq!(words[6..9], ["16.0", "MiB", "in"], "{told}");
        assert!(words[9].parse::<f64>().unwrap() > 0.0 && words[10] == "ms", "{told}");
        assert!(words[11].parse::<f64>().is_ok() && words[12] == "GiB/s", "{told}");
        assert_eq!(words[13..], ["verified"], "{told}");
        assert_eq!(told.lines().count(), 1, "{told}");
    }
}

#[test]
fn the_example_says_what_happened_when_its_peer_is_killed() {
    let folder = Folder::new("killed");
    let program = C11.build(&example(), &folder);
    for _ in 0..3 {
        let quiet = [("CORELANE_LOG_LEVEL", "off")];
        let output = execute(&program, &["--die-after-post"], &quiet);
        let (told, complaints) = text(&output);
        assert_eq!(output.status.code(), Some(1), "{told}{complaints}");
        assert_eq!(told, "", "something was fetched");
        // One line that says what failed, how, and with whom: nothing that follows from it failed as well.
        assert_eq!(complaints.lines().count(), 1, "{complaints}");
        assert!(complaints.starts_with("decode: the read failed: "), "{complaints}");
        assert!(complaints.contains("`prefill-0`"), "{complaints}");
        let named =
            ["remote disconnect", "cannot connect"].iter().any(|name| complaints.contains(name));
        assert!(named, "{complaints}");
    }
}

#[test]
fn the_example_refuses_what_it_does_not_know() {
    let folder = Folder::new("usage");
    let program = C11.build(&example(), &folder);
    for arguments in [&["--die"][..], &["--die-after-post", "x"], &[""]] {
        let output = execute(&program, arguments, &[]);
        let (told, complaints) = text(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(
            told.is_empty() && complaints.starts_with("usage: "),
            "{arguments:?}: {complaints}"
        );
    }
}

#[test]
fn options_of_the_environment_count_unless_the_program_says_otherwise() {
    let folder = Folder::new("environment");
    let program = C11.build(&example(), &folder);
    // The program says on which address to listen; of the rest, nothing.
    let good = [
        ("CORELANE_LISTEN", "no address at all"),
        ("CORELANE_STREAMS", "4"),
        ("CORELANE_CHUNK_BYTES", "64K"),
        ("CORELANE_LINGER_MS", ""),
        ("CORELANE_LOG_LEVEL", "warn"),
        ("CORELANE_TEST_OF_MY_OWN", "x"),
    ];
    let output = execute(&program, &[], &good);
    let (told, complaints) = text(&output);
    assert!(output.status.success() && told.contains("verified"), "{complaints}");
    assert_eq!(complaints, "");
    for (variable, value, valid) in [
        ("CORELANE_TRANSPORTS", "carrier-pigeon", "local,rdma,tcp"),
        ("CORELANE_ASSIST", "sometimes", "auto, always or never"),
        ("CORELANE_LOG_LEVEL", "shout", "off, error, warn, info, debug or trace"),
        ("CORELANE_LANES", "1-0", "2,4-6"),
    ] {
        let output = execute(&program, &[], &[(variable, value)]);
        let (told, complaints) = text(&output);
        assert_eq!(output.status.code(), Some(1), "{variable}");
        assert_eq!(told, "");
        for word in [variable, value, valid] {
            assert!(complaints.contains(word), "{word}: {complaints}");
        }
        assert!(complaints.contains("creating an engine: bad configuration"), "{complaints}");
    }
    // A mistyped variable has no effect, and is named.
    let output =
        execute(&program, &[], &[("CORELANE_STREEMS", "4"), ("CORELANE_LOG_LEVEL", "warn")]);
    let (_, complaints) = text(&output);
    assert!(output.status.success() && complaints.contains("CORELANE_STREEMS"), "{complaints}");
}

#[test]
fn a_forked_child_gets_errors_and_neither_hangs_nor_disturbs_its_parent() {
    let folder = Folder::new("forked");
    let program = C11.build(&own_source("forked.c"), &folder);
    for _ in 0..5 {
        let output = execute(&program, &[], &[("CORELANE_LOG_LEVEL", "warn")]);
        let (told, complaints) = text(&output);
        assert!(output.status.success(), "{:?}: {told}{complaints}", output.status);
        assert_eq!(told, "child: 22 calls refused\nparent: served\n");
    }
}
