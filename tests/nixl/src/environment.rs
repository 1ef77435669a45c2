//! Where NIXL and the plugin are. `tests/run.sh nixl` sets it up; without it a test fails, and says so.

use std::env;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const HINT: &str = "run tests/run.sh nixl";

/// The backend under test: `CORELANE`, unless `CORELANE_TEST_BACKEND` names another one to compare with.
pub fn backend() -> String {
    env::var("CORELANE_TEST_BACKEND").unwrap_or_else(|_| "CORELANE".into())
}

/// Panics with one clear sentence where NIXL or the plugin is not to be found.
///
/// # Panics
///
/// See above.
#[track_caller]
pub fn require_nixl() {
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    if let Some(missing) = MISSING.get_or_init(missing) {
        panic!("{missing}: {HINT}");
    }
}

fn missing() -> Option<String> {
    let plugin = format!("libplugin_{}.so", backend());
    if libraries().is_none() {
        return Some("no folder of LD_LIBRARY_PATH holds NIXL's libnixl_capi.so".into());
    }
    match env::var_os("NIXL_PLUGIN_DIR") {
        None => Some("NIXL_PLUGIN_DIR is not set".into()),
        Some(folder) if Path::new(&folder).join(&plugin).exists() => None,
        Some(folder) => {
            Some(format!("there is no {plugin} in NIXL_PLUGIN_DIR={}", folder.display()))
        }
    }
}

/// The folder of NIXL's libraries.
fn libraries() -> Option<PathBuf> {
    let folders = env::var_os("LD_LIBRARY_PATH")?;
    env::split_paths(&folders).find(|folder| folder.join("libnixl_capi.so").exists())
}

/// A plugin that came with NIXL, next to its libraries.
///
/// # Panics
///
/// Where there is none.
#[track_caller]
pub fn wheel_plugin(backend: &str) -> PathBuf {
    let libraries = libraries().unwrap_or_else(|| {
        panic!("no folder of LD_LIBRARY_PATH holds NIXL's libnixl_capi.so: {HINT}")
    });
    let file = libraries.join("plugins").join(format!("libplugin_{backend}.so"));
    assert!(file.exists(), "{} is not there: {HINT}", file.display());
    file
}

/// The file of the plugin under test: `CORELANE_PLUGIN`, or the one that NIXL finds.
///
/// # Panics
///
/// Where there is none.
#[track_caller]
pub fn plugin_file() -> PathBuf {
    let file = match env::var_os("CORELANE_PLUGIN") {
        Some(file) => PathBuf::from(file),
        None => {
            let folder = env::var_os("NIXL_PLUGIN_DIR").unwrap_or_else(|| {
                panic!("neither CORELANE_PLUGIN nor NIXL_PLUGIN_DIR is set: {HINT}")
            });
            Path::new(&folder).join(format!("libplugin_{}.so", backend()))
        }
    };
    assert!(file.exists(), "the plugin {} is not there: {HINT}", file.display());
    file
}

/// The first core that this process may use, for children that must share one.
pub fn shared_core() -> usize {
    corelane_tests::allowed_cores()[0]
}
