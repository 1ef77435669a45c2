//! The header in `include/` is the one that the crate says.

#![allow(clippy::unwrap_used)]

use std::path::Path;

#[test]
fn the_header_is_generated_from_the_crate() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).unwrap();
    let mut generated = Vec::new();
    cbindgen::Builder::new()
        .with_crate(folder)
        .with_config(config)
        .generate()
        .unwrap()
        .write(&mut generated);
    let generated = String::from_utf8(generated).unwrap();
    let path = folder.join("include/corelane.h");
    if std::env::var_os("CORELANE_UPDATE_HEADER").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        committed, generated,
        "include/corelane.h is not what the crate says: \
         CORELANE_UPDATE_HEADER=1 cargo test -p corelane-capi --test header"
    );
}
