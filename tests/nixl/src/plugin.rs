//! A plugin, loaded as NIXL loads it.

use std::ffi::CStr;
use std::path::Path;
use std::sync::OnceLock;

use crate::cxx::{CxxString, function, open};
use crate::layouts::{InitParams, Parameters, Plugin};
use crate::{plugin_file, require_nixl};

/// The version of the plugin interface.
pub const PLUGIN_API_VERSION: i32 = 1;

/// Asks a plugin for its structure; null where it refuses the NIXL that is loaded.
fn init(file: &Path) -> *const Plugin {
    let library = open(&file.display().to_string());
    // SAFETY: the entry point of every plugin.
    unsafe {
        let init: unsafe extern "C" fn() -> *const Plugin = function(library, "nixl_plugin_init");
        init()
    }
}

/// Whether a plugin comes up beside a library that calls itself NIXL.
pub fn accepts(plugin: &Path, nixl: &Path) -> bool {
    open(&nixl.display().to_string());
    !init(plugin).is_null()
}

/// What an agent reads straight out of a plugin's structures and out of an engine: the same for every plugin that was
/// built against the same interface.
pub fn layout(file: &Path, kind: &str) -> String {
    open("libnixl.so");
    let plugin = init(file);
    assert!(!plugin.is_null(), "nixl_plugin_init gave nothing");
    // SAFETY: the plugin's own structure, for good.
    let plugin = unsafe { &*plugin };
    let parameters = Parameters::new(&[]);
    let init = InitParams {
        local_agent: CxxString::reading(b"an agent whose name is not short"),
        kind: CxxString::reading(b"a kind whose name is not short"),
        params: &raw const *parameters.map,
        progress_thread: false,
        progress_delay_us: 0,
        sync_mode: 0,
        telemetry: true,
    };
    // SAFETY: parameters as an agent would pass them; then reads inside the engine's first 208 bytes, which every engine
    // has. The kind follows the pointer to the virtual functions.
    unsafe {
        let engine = (plugin.create)(&raw const init);
        assert!(!engine.is_null(), "no engine of {kind}");
        let at = |offset: usize| engine.cast::<u8>().add(offset);
        let text = |offset| {
            String::from_utf8_lossy(&(*at(offset).cast::<CxxString>()).bytes()).into_owned()
        };
        format!(
            "interface {} named {} kind `{}` failed {} agent `{}` telemetry {}",
            plugin.api_version,
            CStr::from_ptr((plugin.name)()).to_string_lossy() == kind,
            text(8),
            at(160).read(),
            text(168),
            at(200).read(),
        )
    }
}

/// The plugin under test.
#[track_caller]
pub(crate) fn plugin() -> &'static Plugin {
    static PLUGIN: OnceLock<usize> = OnceLock::new();
    let address = PLUGIN.get_or_init(|| {
        require_nixl();
        // The plugin looks for the NIXL that is loaded.
        open("libnixl.so");
        let plugin = init(&plugin_file());
        assert!(!plugin.is_null(), "nixl_plugin_init gave nothing");
        plugin as usize
    });
    // SAFETY: the plugin's own structure, which lives as long as the plugin: for good.
    unsafe { &*(*address as *const Plugin) }
}

/// Name and version of the plugin, and the version of the interface that it is for.
pub fn plugin_name() -> (String, String, i32) {
    let plugin = plugin();
    // SAFETY: functions of the plugin that give strings for good.
    unsafe {
        let text = |text| CStr::from_ptr(text).to_string_lossy().into_owned();
        (text((plugin.name)()), text((plugin.version)()), plugin.api_version)
    }
}
