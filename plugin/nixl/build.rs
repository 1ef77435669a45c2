//! Compiles the C++ half of the plugin.

use std::path::{Path, PathBuf};

fn main() {
    // Asked for when it runs: a checkout may be moved together with its target folder.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default();
    let capi = Path::new(&package).join("../capi/include");
    let header = capi.join("corelane.h");
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-changed={}", header.display());
    println!("cargo:rerun-if-env-changed=NIXL_INCLUDE_DIR");

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .warnings(true)
        .extra_warnings(true)
        .flag_if_supported("-Wno-unused-parameter")
        .flag("-fvisibility=hidden")
        .flag("-fvisibility-inlines-hidden")
        .include(&capi)
        .include("cpp");
    if let Some(folders) = std::env::var_os("NIXL_INCLUDE_DIR") {
        // NIXL's own headers (and those that they include) instead of our declarations.
        build.std("c++20").includes(std::env::split_paths(&folders));
        build.define("CORELANE_NIXL_HEADERS", None);
    }
    build
        .file("cpp/plugin.cpp")
        .file("cpp/engine.cpp")
        .file("cpp/requests.cpp")
        .file(hidden_names(&header))
        .compile("corelane_nixl");
}

/// A file that names every function of the C API as hidden: Rust would export them from this library,
/// too, and the linker gives a symbol the narrowest visibility that any object file asks for. The
/// table is what makes the compiler name them; something that is linked must refer to it.
fn hidden_names(header: &Path) -> PathBuf {
    let text = std::fs::read_to_string(header).unwrap_or_default();
    let mut names: Vec<&str> = text
        .match_indices("corelane_")
        .filter_map(|(at, _)| {
            let rest = &text[at..];
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
            rest[end..].starts_with('(').then_some(&rest[..end])
        })
        .collect();
    names.sort_unstable();
    names.dedup();
    assert!(names.contains(&"corelane_engine_create"), "{} is no header", header.display());
    let declared: String = names.iter().map(|name| format!("void {name}();\n")).collect();
    let listed: String = names.iter().map(|name| format!("    {name},\n")).collect();
    let file = format!(
        "#pragma GCC visibility push(hidden)\nextern \"C\" {{\n{declared}}}\n\
         extern void (*const corelane_hidden_names[])();\n\
         void (*const corelane_hidden_names[])() = {{\n{listed}}};\n\
         #pragma GCC visibility pop\n"
    );
    let path = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default()).join("hidden.cpp");
    std::fs::write(&path, file).expect("the build folder can be written to");
    path
}
