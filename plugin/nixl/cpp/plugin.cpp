// What NIXL's plugin manager sees: the plugin's name, options and engines, after a look at which
// NIXL has loaded it.

#include "engine.h"

#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <link.h>

namespace {

// Below 1.0.0 the virtual functions of a backend are others, although the version number of the
// plugin interface was the same: calling through them would crash. What 1.0.0 brought is a function
// of the agent, by which it is told from its predecessors.
constexpr const char *kAgentOf100 =
    "_ZNK9nixlAgent11prepMemViewERK12nixlDescListI13nixlBasicDescERPvPK21nixlAgentOptionalArgs";
constexpr const char *kAgentOf100Remote =
    "_ZNK9nixlAgent11prepMemViewERK12nixlDescListI14nixlRemoteDescERPvPK21nixlAgentOptionalArgs";

// Finds the NIXL that is loaded in this process, if its file has the usual name.
int rememberNixl(dl_phdr_info *info, size_t, void *context) {
    const char *path = info->dlpi_name;
    if (path == nullptr) {
        return 0;
    }
    const char *slash = std::strrchr(path, '/');
    const char *file = slash == nullptr ? path : slash + 1;
    if (std::strcmp(file, "libnixl.so") != 0 && std::strncmp(file, "libnixl-", 8) != 0 &&
        std::strncmp(file, "libnixl.so.", 11) != 0) {
        return 0;
    }
    *static_cast<std::string *>(context) = path;
    return 1;
}

bool isUsable() {
    std::string path;
    dl_iterate_phdr(rememberNixl, &path);
    if (path.empty()) {
        // Built into the program, or under another name: nothing can be said about it.
        return true;
    }
    void *nixl = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    if (nixl == nullptr) {
        return true;
    }
    const bool known =
        dlsym(nixl, kAgentOf100) != nullptr || dlsym(nixl, kAgentOf100Remote) != nullptr;
    dlclose(nixl);
    if (!known) {
        std::fprintf(stderr,
                     "corelane: the backend CORELANE needs NIXL 1.0.0 or newer, and %s is older (or "
                     "so new that this plugin does not know it): pip install --upgrade nixl\n",
                     path.c_str());
    }
    return known;
}

nixlBackendEngine *createEngine(const nixlBackendInitParams *params) {
    try {
        return new nixlCorelaneEngine(params);
    } catch (...) {
        return nullptr;
    }
}

void destroyEngine(nixlBackendEngine *engine) { delete engine; }

// Every option with the value in effect without an explicit one.
nixl_b_params_t backendOptions() {
    nixl_b_params_t options;
    corelane_option_info info{};
    for (size_t at = 0; corelane_option_at(at, &info) == CORELANE_OK; ++at) {
        options.emplace(info.name, info.default_value);
        if (at + 1 == corelane_option_count()) {
            break;
        }
    }
    return options;
}

nixlBackendPlugin plugin = {
    NIXL_PLUGIN_API_VERSION,
    createEngine,
    destroyEngine,
    [] { return "CORELANE"; },
    [] { return corelane_version(); },
    backendOptions,
    corelane::supportedMems,
};

} // namespace

// Made by build.rs: keeps the C API out of what this library exports.
extern void (*const corelane_hidden_names[])();
__attribute__((used)) static void (*const *const hiddenNames)() = corelane_hidden_names;

extern "C" void *corelane_nixl_plugin_init() { return isUsable() ? &plugin : nullptr; }

extern "C" void corelane_nixl_plugin_fini() {}
