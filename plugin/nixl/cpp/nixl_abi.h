// The south-bound interface of NIXL (what its agent calls in a backend), declared in our own words.
//
// NIXL's wheels ship no headers, and a plugin needs none of NIXL's code: it needs the layout of the
// objects that cross the border and the order of the virtual functions. Both were measured on the
// wheels 1.0.0 to 1.5.1 (LP64, libstdc++ with its cxx11 strings), are asserted at the end of this
// file, and are compared with the wheel's own UCX plugin by tests/nixl/tests/abi.rs. Who has NIXL's
// headers builds against them instead: NIXL_INCLUDE_DIR.

#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#if !defined(_GLIBCXX_USE_CXX11_ABI) || _GLIBCXX_USE_CXX11_ABI != 1
#error "NIXL uses libstdc++ with its cxx11 strings: build with -D_GLIBCXX_USE_CXX11_ABI=1"
#endif

// Kind of memory or storage of a descriptor list.
enum nixl_mem_t { DRAM_SEG, VRAM_SEG, BLK_SEG, OBJ_SEG, FILE_SEG };

// READ: from the remote agent into local memory.
enum nixl_xfer_op_t { NIXL_READ, NIXL_WRITE };

// What a call came to; docs/nixl.md says which one corelane gives when.
enum nixl_status_t {
    NIXL_IN_PROG = 1,
    NIXL_SUCCESS = 0,
    NIXL_ERR_NOT_POSTED = -1,
    NIXL_ERR_INVALID_PARAM = -2,
    NIXL_ERR_BACKEND = -3,
    NIXL_ERR_NOT_FOUND = -4,
    NIXL_ERR_MISMATCH = -5,
    NIXL_ERR_NOT_ALLOWED = -6,
    NIXL_ERR_REPOST_ACTIVE = -7,
    NIXL_ERR_UNKNOWN = -8,
    NIXL_ERR_NOT_SUPPORTED = -9,
    NIXL_ERR_REMOTE_DISCONNECT = -10,
    NIXL_ERR_CANCELED = -11,
    NIXL_ERR_NO_TELEMETRY = -12,
};

// Whether the agent locks; with NONE, calls come from any thread at any time.
enum class nixl_thread_sync_t { NIXL_THREAD_SYNC_NONE, NIXL_THREAD_SYNC_STRICT, NIXL_THREAD_SYNC_RW };

// How an estimate was made.
enum class nixl_cost_t { ANALYTICAL_BACKEND = 0 };

using nixl_blob_t = std::string;
using nixl_backend_t = std::string;
using nixl_b_params_t = std::unordered_map<std::string, std::string>;
using nixl_mem_list_t = std::vector<nixl_mem_t>;
using nixl_query_resp_t = std::optional<nixl_b_params_t>;
// Pairs of the sender's agent name and the payload.
using notif_list_t = std::vector<std::pair<std::string, std::string>>;
using nixlMemViewH = void *;

// The arguments of the application; a backend never looks inside.
struct nixlAgentOptionalArgs;
using nixl_opt_args_t = nixlAgentOptionalArgs;

// A range of memory: address, bytes, device.
class nixlBasicDesc {
public:
    uintptr_t addr;
    size_t len;
    uint64_t devId;
};

// A range with bytes of the application or of a remote backend.
class nixlBlobDesc : public nixlBasicDesc {
public:
    std::string metaInfo;
};

// A request of the backend. Deleted by the backend.
class nixlBackendReqH {
public:
    virtual ~nixlBackendReqH() {}
};

// What a backend keeps of a registration. Deleted by the backend.
class nixlBackendMD {
protected:
    bool isPrivateMD;

public:
    explicit nixlBackendMD(bool isPrivate) : isPrivateMD(isPrivate) {}
    virtual ~nixlBackendMD() {}
};

class nixlMetaDesc : public nixlBasicDesc {
public:
    nixlBackendMD *metadataP;
};

struct nixlRemoteMetaDesc : nixlMetaDesc {
    std::string remoteAgent;
};

// A list of descriptors. Only ever received by reference: made and destroyed by the agent.
template <class T> class nixlDescList {
    const void *vtable_;
    nixl_mem_t type;
    std::vector<T> descs;

public:
    nixlDescList() = delete;
    nixl_mem_t getType() const { return type; }
    int descCount() const { return static_cast<int>(descs.size()); }
    const T &operator[](size_t index) const { return descs[index]; }
};

using nixl_meta_dlist_t = nixlDescList<nixlMetaDesc>;
using nixl_reg_dlist_t = nixlDescList<nixlBlobDesc>;
using nixl_remote_meta_dlist_t = nixlDescList<nixlRemoteMetaDesc>;

// Arguments of one posting.
struct nixlBackendOptionalArgs {
    nixl_blob_t notifMsg;
    bool hasNotif = false;
    nixl_blob_t customParam;
};
using nixl_opt_b_args_t = nixlBackendOptionalArgs;

class nixlBackendInitParams {
public:
    std::string localAgent;
    nixl_backend_t type;
    nixl_b_params_t *customParams = nullptr;
    bool enableProgTh = false;
    // Microseconds between turns of the progress thread.
    uint64_t pthrDelay = 0;
    nixl_thread_sync_t syncMode;
    bool enableTelemetry_ = false;
};

// The base of all backends. The agent reads its members by inlined accessors, so that their layout
// is part of the interface, like the order of the virtual functions.
class nixlBackendEngine {
    nixl_backend_t backendType;
    nixl_b_params_t customParams;
    // Telemetry of the agent: read and swapped there, never filled by this backend, so that only the
    // size of the vector matters and not that of its elements.
    struct TelemetryEvent {
        char opaque[16];
    };
    std::vector<TelemetryEvent> telemetryEvents_;
    std::mutex telemetryEventsMutex_;

protected:
    // Set by a constructor that failed.
    bool initErr = false;
    const std::string localAgent;
    const bool enableTelemetry_;

public:
    explicit nixlBackendEngine(const nixlBackendInitParams *params)
        : backendType(params->type), customParams(*params->customParams),
          localAgent(params->localAgent), enableTelemetry_(params->enableTelemetry_) {}
    nixlBackendEngine(const nixlBackendEngine &) = delete;
    void operator=(const nixlBackendEngine &) = delete;

    virtual ~nixlBackendEngine() = default;
    virtual bool supportsRemote() const = 0;
    virtual bool supportsLocal() const = 0;
    virtual bool supportsNotif() const = 0;
    virtual nixl_mem_list_t getSupportedMems() const = 0;
    virtual nixl_status_t registerMem(const nixlBlobDesc &, const nixl_mem_t &, nixlBackendMD *&) = 0;
    virtual nixl_status_t deregisterMem(nixlBackendMD *) = 0;
    virtual nixl_status_t connect(const std::string &) = 0;
    virtual nixl_status_t disconnect(const std::string &) = 0;
    virtual nixl_status_t unloadMD(nixlBackendMD *) = 0;
    virtual nixl_status_t prepXfer(const nixl_xfer_op_t &, const nixl_meta_dlist_t &,
                                   const nixl_meta_dlist_t &, const std::string &, nixlBackendReqH *&,
                                   const nixl_opt_b_args_t * = nullptr) const = 0;
    virtual nixl_status_t postXfer(const nixl_xfer_op_t &, const nixl_meta_dlist_t &,
                                   const nixl_meta_dlist_t &, const std::string &, nixlBackendReqH *&,
                                   const nixl_opt_b_args_t * = nullptr) const = 0;
    virtual nixl_status_t checkXfer(nixlBackendReqH *) const = 0;
    virtual nixl_status_t releaseReqH(nixlBackendReqH *) const = 0;
    virtual nixl_status_t prepMemView(const nixl_remote_meta_dlist_t &, nixlMemViewH &,
                                      const nixl_opt_b_args_t * = nullptr) const {
        return NIXL_ERR_NOT_SUPPORTED;
    }
    virtual nixl_status_t prepMemView(const nixl_meta_dlist_t &, nixlMemViewH &,
                                      const nixl_opt_b_args_t * = nullptr) const {
        return NIXL_ERR_NOT_SUPPORTED;
    }
    virtual void releaseMemView(nixlMemViewH) const {}
    virtual nixl_status_t getPublicData(const nixlBackendMD *, std::string &) const {
        return NIXL_ERR_BACKEND;
    }
    virtual nixl_status_t getConnInfo(std::string &) const { return NIXL_ERR_BACKEND; }
    virtual nixl_status_t loadRemoteConnInfo(const std::string &, const std::string &) {
        return NIXL_ERR_BACKEND;
    }
    virtual nixl_status_t loadRemoteMD(const nixlBlobDesc &, const nixl_mem_t &, const std::string &,
                                       nixlBackendMD *&) {
        return NIXL_ERR_BACKEND;
    }
    virtual nixl_status_t loadLocalMD(nixlBackendMD *, nixlBackendMD *&) { return NIXL_ERR_BACKEND; }
    virtual nixl_status_t getNotifs(notif_list_t &) { return NIXL_ERR_BACKEND; }
    virtual nixl_status_t genNotif(const std::string &, const std::string &) const {
        return NIXL_ERR_BACKEND;
    }
    virtual nixl_status_t queryMem(const nixl_reg_dlist_t &, std::vector<nixl_query_resp_t> &) const {
        return NIXL_ERR_NOT_SUPPORTED;
    }
    virtual nixl_status_t estimateXferCost(const nixl_xfer_op_t &, const nixl_meta_dlist_t &,
                                           const nixl_meta_dlist_t &, const std::string &,
                                           nixlBackendReqH *const &, std::chrono::microseconds &,
                                           std::chrono::microseconds &, nixl_cost_t &,
                                           const nixl_opt_args_t * = nullptr) const {
        return NIXL_ERR_NOT_SUPPORTED;
    }

    friend struct CorelaneAbiCheck;
};

// What nixl_plugin_init gives to the agent.
class nixlBackendPlugin {
public:
    int api_version;
    nixlBackendEngine *(*create_engine)(const nixlBackendInitParams *);
    void (*destroy_engine)(nixlBackendEngine *);
    const char *(*get_plugin_name)();
    const char *(*get_plugin_version)();
    nixl_b_params_t (*get_backend_options)();
    nixl_mem_list_t (*get_backend_mems)();
};

#define NIXL_PLUGIN_API_VERSION 1

// Sizes and offsets as the wheels have them.
struct CorelaneAbiCheck {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winvalid-offsetof"
    static_assert(sizeof(nixlBackendEngine) == 208);
    static_assert(offsetof(nixlBackendEngine, initErr) == 160);
    static_assert(offsetof(nixlBackendEngine, localAgent) == 168);
    static_assert(offsetof(nixlBackendEngine, enableTelemetry_) == 200);
    static_assert(sizeof(nixlBackendInitParams) == 96);
    static_assert(offsetof(nixlBackendInitParams, type) == 32);
    static_assert(offsetof(nixlBackendInitParams, customParams) == 64);
    static_assert(offsetof(nixlBackendInitParams, enableProgTh) == 72);
    static_assert(offsetof(nixlBackendInitParams, pthrDelay) == 80);
    static_assert(offsetof(nixlBackendInitParams, syncMode) == 88);
    static_assert(offsetof(nixlBackendInitParams, enableTelemetry_) == 92);
    static_assert(sizeof(nixlBackendPlugin) == 56);
    static_assert(sizeof(nixlBackendMD) == 16);
    static_assert(sizeof(nixlBackendReqH) == 8);
    static_assert(sizeof(nixlBasicDesc) == 24);
    static_assert(sizeof(nixlBlobDesc) == 56);
    static_assert(sizeof(nixlMetaDesc) == 32);
    static_assert(sizeof(nixlRemoteMetaDesc) == 64);
    static_assert(sizeof(nixl_meta_dlist_t) == 40);
    static_assert(sizeof(nixlBackendOptionalArgs) == 72);
    static_assert(offsetof(nixlBackendOptionalArgs, hasNotif) == 32);
    static_assert(offsetof(nixlBackendOptionalArgs, customParam) == 40);
#pragma GCC diagnostic pop
};
