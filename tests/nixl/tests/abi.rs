//! The file: what it exports, what it needs, and whether its virtual functions lie where NIXL calls them. The yardstick is a
//! plugin that came with the installed NIXL.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::collections::BTreeMap;
use std::path::Path;

use corelane_nixl_tests::{
    Engine, PLUGIN_API_VERSION, backend, peer_process, plugin_file, plugin_name, wheel_plugin,
};
use object::elf::{FileHeader64, Rela64, STB_LOCAL};
use object::read::elf::{Dyn, ElfFile64, FileHeader, Rela, SectionHeader, Sym};
use object::{Endianness, Object, ObjectSymbol, ObjectSymbolTable};

type Header = FileHeader64<Endianness>;

/// An ELF file in memory.
struct Elf {
    bytes: Vec<u8>,
}

impl Elf {
    fn read(file: &Path) -> Self {
        let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        Self { bytes }
    }

    fn parsed(&self) -> ElfFile64<'_> {
        ElfFile64::parse(self.bytes.as_slice()).expect("an ELF file of 64 bits")
    }

    /// Names of the dynamic symbols that the file defines and others can bind to.
    fn exports(&self) -> Vec<String> {
        let file = self.parsed();
        let table = file.dynamic_symbol_table().expect("dynamic symbols");
        let endian = file.endian();
        let mut names: Vec<String> = table
            .symbols()
            .filter(|symbol| !symbol.is_undefined() && symbol.elf_symbol().st_bind() != STB_LOCAL)
            .inspect(|symbol| assert!(symbol.elf_symbol().st_name(endian) > 0))
            .map(|symbol| symbol.name().expect("a name").to_owned())
            .collect();
        names.sort();
        names
    }

    /// The libraries that the file names.
    fn needs(&self) -> Vec<String> {
        let header = Header::parse(self.bytes.as_slice()).expect("a header");
        let endian = header.endian().expect("an endianness");
        let sections = header.sections(endian, self.bytes.as_slice()).expect("sections");
        let (entries, link) = sections
            .dynamic(endian, self.bytes.as_slice())
            .expect("a readable dynamic section")
            .expect("a dynamic section");
        let strings =
            sections.strings(endian, self.bytes.as_slice(), link).expect("dynamic strings");
        entries
            .iter()
            .filter(|entry| entry.tag(endian) == object::elf::DT_NEEDED)
            .map(|entry| {
                let name = entry.string(endian, strings).expect("a name");
                String::from_utf8_lossy(name).into_owned()
            })
            .collect()
    }

    /// Symbols by address, of both tables.
    fn symbols(&self) -> BTreeMap<u64, Vec<String>> {
        let file = self.parsed();
        let mut names: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        for symbol in file.symbols().chain(file.dynamic_symbols()) {
            if symbol.address() != 0 && !symbol.is_undefined() {
                let known = names.entry(symbol.address()).or_default();
                let name = symbol.name().expect("a name").to_owned();
                if !known.contains(&name) {
                    known.push(name);
                }
            }
        }
        names
    }

    /// Where a symbol lies and how long it is.
    fn place(&self, name: &str) -> Option<(u64, u64)> {
        let file = self.parsed();
        file.symbols()
            .chain(file.dynamic_symbols())
            .find(|symbol| symbol.name() == Ok(name) && !symbol.is_undefined())
            .map(|symbol| (symbol.address(), symbol.size()))
    }

    /// What the loader writes at an address: a symbol's name, or an address within the file.
    fn relocations(&self) -> BTreeMap<u64, (Option<String>, u64)> {
        let file = self.parsed();
        let endian = file.endian();
        let dynamic: Vec<String> = std::iter::once(String::new())
            .chain(file.dynamic_symbols().map(|s| s.name().unwrap_or_default().to_owned()))
            .collect();
        let mut found = BTreeMap::new();
        for section in file.sections() {
            let header = section.elf_section_header();
            let Ok(Some((entries, _))) = header.rela(endian, self.bytes.as_slice()) else {
                continue;
            };
            for entry in entries as &[Rela64<Endianness>] {
                let symbol = entry.r_sym(endian, false) as usize;
                let name = (symbol != 0).then(|| dynamic[symbol].clone());
                found.insert(entry.r_offset(endian), (name, entry.r_addend(endian) as u64));
            }
        }
        found
    }

    /// The virtual functions of a class, by their mangled names, one list of aliases for each slot.
    fn virtual_functions(&self, class: &str) -> Vec<Vec<String>> {
        let (start, size) = self
            .place(&format!("_ZTV{}{class}", class.len()))
            .unwrap_or_else(|| panic!("no table of virtual functions of {class}"));
        let (symbols, relocations) = (self.symbols(), self.relocations());
        // The offset to the top and the type information come first.
        (start + 16..start + size)
            .step_by(8)
            .map(|slot| match relocations.get(&slot) {
                Some((Some(name), _)) => vec![name.clone()],
                Some((None, address)) => symbols
                    .get(address)
                    .cloned()
                    .unwrap_or_else(|| vec![format!("an unnamed function at {address:#x}")]),
                None => vec!["nothing".into()],
            })
            .collect()
    }
}

/// `nixlUcxEngine::connect(...)` as `connect(...)`: the class does not matter, all else does.
fn without_class(mangled: &str) -> String {
    let name = cpp_demangle::Symbol::new(mangled)
        .ok()
        .and_then(|symbol| symbol.demangle().ok())
        .unwrap_or_else(|| mangled.to_owned());
    let head = name.find('(').unwrap_or(name.len());
    let start = name[..head].rfind("::").map_or(0, |at| at + 2);
    let method = if name[start..].starts_with('~') {
        format!("~{}", &name[head..])
    } else {
        name[start..].to_owned()
    };
    // The destructor that also frees is another function with the same name.
    if mangled.contains("D0Ev") { format!("{method} and delete") } else { method }
}

fn ours() -> Elf {
    Elf::read(&plugin_file())
}

fn engine_class() -> &'static str {
    if backend() == "UCX" { "nixlUcxEngine" } else { "nixlCorelaneEngine" }
}

#[test]
fn the_plugin_exports_its_two_entry_points_and_nothing_else() {
    assert_eq!(ours().exports(), ["nixl_plugin_fini", "nixl_plugin_init"]);
}

#[test]
fn the_plugin_needs_only_the_libraries_of_every_system() {
    let allowed = ["libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "ld-linux"];
    for needed in ours().needs() {
        assert!(allowed.iter().any(|name| needed.starts_with(name)), "the plugin needs {needed}");
    }
}

#[test]
fn the_plugin_takes_nothing_from_nixl() {
    let elf = ours();
    let file = elf.parsed();
    let taken: Vec<_> = file
        .dynamic_symbols()
        .filter(|symbol| symbol.is_undefined())
        .map(|symbol| symbol.name().expect("a name").to_owned())
        .filter(|name| name.contains("nixl") || name.contains("corelane"))
        .collect();
    assert_eq!(taken, Vec::<String>::new());
}

#[test]
fn virtual_functions_lie_where_those_of_the_wheels_plugin_lie() {
    let wheel = Elf::read(&wheel_plugin("UCX"));
    // How many there are is what the class of all engines says, what they are one of its children: the parent's slots
    // hold no names where it leaves the work to them. The child has functions of its own behind them.
    let count = wheel.virtual_functions("nixlBackendEngine").len();
    let mut theirs = wheel.virtual_functions("nixlUcxEngine");
    theirs.truncate(count);
    let ours = ours().virtual_functions(engine_class());
    let plain = |slots: &[Vec<String>]| -> Vec<Vec<String>> {
        slots
            .iter()
            .map(|names| {
                let mut plain: Vec<_> = names.iter().map(|name| without_class(name)).collect();
                plain.sort();
                plain.dedup();
                plain
            })
            .collect()
    };
    let (ours, theirs) = (plain(&ours), plain(&theirs));
    // Two destructors and 25 functions: docs/nixl.md.
    assert_eq!(theirs.len(), 27, "the wheel's own: {theirs:#?}");
    assert_eq!(ours.len(), theirs.len(), "ours: {ours:#?}");
    for (slot, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        // One body may have several names, where the compiler has found functions alike.
        assert!(
            ours.iter().any(|name| theirs.contains(name)),
            "slot {slot} is {ours:?} and not {theirs:?}"
        );
    }
}

#[test]
fn the_comparison_sees_what_it_has_to_see() {
    let connect =
        "_ZN13nixlUcxEngine7connectERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE";
    let plain = without_class(connect);
    assert!(plain.starts_with("connect(std::") && plain.ends_with("const&)"), "{plain}");
    assert_eq!(without_class(&connect.replace("13nixlUcxEngine", "18nixlCorelaneEngine")), plain);
    assert_ne!(without_class(&connect.replace("7connect", "10disconnect")), plain);
    assert_ne!(without_class(&connect.replace("ERKN", "ERN")), plain);
    assert_ne!(without_class("_ZN13nixlUcxEngineD0Ev"), without_class("_ZN13nixlUcxEngineD1Ev"));
    assert_eq!(
        without_class("_ZN13nixlUcxEngineD1Ev"),
        without_class("_ZN18nixlCorelaneEngineD1Ev")
    );
    let const_one = without_class("_ZNK13nixlUcxEngine14supportsRemoteEv");
    assert_ne!(const_one, without_class("_ZN13nixlUcxEngine14supportsRemoteEv"));
}

#[test]
fn the_plugin_says_its_name_and_the_interface_it_is_for() {
    let (name, version, interface) = plugin_name();
    assert_eq!(name, backend());
    assert!(!version.is_empty());
    assert_eq!(interface, PLUGIN_API_VERSION);
}

#[test]
fn the_engine_says_what_it_supports() {
    let engine = Engine::new("abi", &[]);
    assert_eq!(engine.supports(), [true; 3]);
    // Main memory; other kinds have issues of their own.
    assert!(engine.memory_kinds().contains(&0));
}

#[test]
fn an_agent_finds_everything_where_the_wheels_plugin_has_it() {
    // A process that has made a UCX backend does not end well, so each has its own, which is killed.
    let layout =
        |file: &Path, kind: &str| peer_process!().ask(&format!("layout {} {kind}", file.display()));
    let theirs = layout(&wheel_plugin("UCX"), "UCX");
    assert_eq!(layout(&plugin_file(), &backend()), theirs);
    for expected in ["named true", "an agent whose name", "a kind whose name", "telemetry 1"] {
        assert!(theirs.contains(expected), "the comparison compares nothing: {theirs}");
    }
}

#[test]
fn a_nixl_that_is_too_old_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    // Before 1.0.0 there was no prepMemView.
    let (source, library) = (folder.path().join("old.cpp"), folder.path().join("libnixl.so"));
    std::fs::write(
        &source,
        "struct nixlAgent { void postXferReq(); };\nvoid nixlAgent::postXferReq() {}\n",
    )
    .unwrap();
    let built = std::process::Command::new("g++")
        .args(["-shared", "-fPIC", "-Wl,-soname,libnixl.so", "-o"])
        .arg(&library)
        .arg(&source)
        .status()
        .expect("g++, which nixl-sys needs too");
    assert!(built.success());
    let ask = |nixl: &Path| {
        let mut process = peer_process!();
        process.ask(&format!("accepts {} {}", plugin_file().display(), nixl.display()))
    };
    let old = ask(&library);
    assert_eq!(old, "false", "an old NIXL was accepted");
    let wheel = wheel_plugin("UCX");
    let nixl = wheel.parent().and_then(Path::parent).unwrap().join("libnixl.so");
    assert_eq!(ask(&nixl), "true", "this NIXL was refused");
}
