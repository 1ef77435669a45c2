// The NIXL backend CORELANE: translates between NIXL's south-bound interface and corelane's C API.
//
// Nothing is decided here. Every function may be called from any thread at any time (NIXL's sync
// mode NONE); what is shared is either constant, behind a lock of the control plane, or a handle
// that the C API checks. postXfer, checkXfer, getNotifs and genNotif to a known peer take no lock
// that any other call holds while it waits.

#pragma once

#ifdef CORELANE_NIXL_HEADERS
#include "backend/backend_engine.h"
#include "backend/backend_plugin.h"
#else
#include "nixl_abi.h"
#endif

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>

#include "corelane.h"

namespace corelane {

// Beyond the operation timeout, after which every transfer has ended: for the lanes to say so.
constexpr int64_t kGraceMs = 1000;

// docs/nixl.md has this table.
nixl_status_t toNixl(corelane_status status);

// Host memory; GPU memory where there are a GPU and the CUDA driver.
nixl_mem_list_t supportedMems();

// The peer behind a name, as long as anybody uses it.
class Conn {
public:
    explicit Conn(corelane_conn_t handle) : handle_(handle) {}
    Conn(const Conn &) = delete;
    Conn &operator=(const Conn &) = delete;
    ~Conn() {
        if (!unloaded_.load()) {
            corelane_conn_destroy(handle_);
        }
    }

    corelane_conn_t handle() const { return handle_; }

    // Ends the session and forgets the peer; only the first call does. Waits this long at most for
    // notifications to be acknowledged; the lane goes on with that by itself.
    corelane_status unload(int64_t timeoutMs) {
        return unloaded_.exchange(true) ? CORELANE_OK : corelane_unload_peer(handle_, timeoutMs);
    }

private:
    const corelane_conn_t handle_;
    std::atomic<bool> unloaded_{false};
};

// A registered range. Registrations of equal ranges share it, because an agent that loads metadata
// takes other bytes for a range that it knows for a change of the metadata, and refuses them.
struct Registration {
    corelane_region_t region = 0;
    // CORELANE_MEMORY_... and, of GPU memory, the device.
    uint32_t kind = CORELANE_MEMORY_DRAM;
    uint32_t device = 0;
    // What peers need; the same bytes for as long as the registration lives.
    std::string descriptor;
    // How many there are; behind the engine's lock.
    size_t count = 1;
};

// Memory of this agent.
class LocalMD final : public nixlBackendMD {
public:
    LocalMD(std::pair<uintptr_t, size_t> range, std::shared_ptr<Registration> registration)
        : nixlBackendMD(true), range(range), registration(std::move(registration)) {}

    const std::pair<uintptr_t, size_t> range;
    const std::shared_ptr<Registration> registration;
};

// Memory of a peer, or of this agent as the target of its own transfers.
class RemoteMD final : public nixlBackendMD {
public:
    explicit RemoteMD(corelane_desc_t descriptor) : nixlBackendMD(false), descriptor(descriptor) {}
    ~RemoteMD() override { corelane_descriptor_destroy(descriptor); }

    const corelane_desc_t descriptor;
};

// A range as it was when a request was prepared.
struct Range {
    uintptr_t addr = 0;
    size_t len = 0;

    explicit Range(const nixlBasicDesc &desc) : addr(desc.addr), len(desc.len) {}
    bool operator==(const Range &other) const { return addr == other.addr && len == other.len; }
};

// A prepared transfer. It keeps all that it needs: no metadata of NIXL's is looked at again.
class Request final : public nixlBackendReqH {
public:
    Request(corelane_xfer_t xfer, nixl_xfer_op_t operation, const nixl_meta_dlist_t &local,
            const nixl_meta_dlist_t &remote);

    // Whether these are the lists that were prepared, as far as a look of constant cost tells.
    bool matches(nixl_xfer_op_t operation, const nixl_meta_dlist_t &local,
                 const nixl_meta_dlist_t &remote) const;

    const corelane_xfer_t xfer;
    // A release has been asked for, and the memory was not quiet. It can be posted no more.
    std::atomic<bool> releasing{false};

private:
    const nixl_xfer_op_t operation_;
    const int count_;
    const Range firstLocal_, lastLocal_, firstRemote_, lastRemote_;
};

} // namespace corelane

class nixlCorelaneEngine final : public nixlBackendEngine {
public:
    explicit nixlCorelaneEngine(const nixlBackendInitParams *params);
    ~nixlCorelaneEngine() override;

    bool supportsRemote() const override { return true; }
    bool supportsLocal() const override { return true; }
    bool supportsNotif() const override { return true; }
    nixl_mem_list_t getSupportedMems() const override { return corelane::supportedMems(); }

    nixl_status_t registerMem(const nixlBlobDesc &mem, const nixl_mem_t &type,
                              nixlBackendMD *&out) override;
    nixl_status_t deregisterMem(nixlBackendMD *meta) override;
    nixl_status_t connect(const std::string &agent) override;
    nixl_status_t disconnect(const std::string &agent) override;
    nixl_status_t unloadMD(nixlBackendMD *input) override;
    nixl_status_t prepXfer(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local,
                           const nixl_meta_dlist_t &remote, const std::string &agent,
                           nixlBackendReqH *&handle,
                           const nixl_opt_b_args_t *args = nullptr) const override;
    nixl_status_t postXfer(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local,
                           const nixl_meta_dlist_t &remote, const std::string &agent,
                           nixlBackendReqH *&handle,
                           const nixl_opt_b_args_t *args = nullptr) const override;
    nixl_status_t checkXfer(nixlBackendReqH *handle) const override;
    nixl_status_t releaseReqH(nixlBackendReqH *handle) const override;
    nixl_status_t getPublicData(const nixlBackendMD *meta, std::string &out) const override;
    nixl_status_t getConnInfo(std::string &out) const override;
    nixl_status_t loadRemoteConnInfo(const std::string &agent, const std::string &info) override;
    nixl_status_t loadRemoteMD(const nixlBlobDesc &input, const nixl_mem_t &type,
                               const std::string &agent, nixlBackendMD *&output) override;
    nixl_status_t loadLocalMD(nixlBackendMD *input, nixlBackendMD *&output) override;
    nixl_status_t getNotifs(notif_list_t &list) override;
    nixl_status_t genNotif(const std::string &agent, const std::string &message) const override;
    nixl_status_t queryMem(const nixl_reg_dlist_t &descs,
                           std::vector<nixl_query_resp_t> &answers) const override;
    nixl_status_t estimateXferCost(const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local,
                                   const nixl_meta_dlist_t &remote, const std::string &agent,
                                   nixlBackendReqH *const &handle,
                                   std::chrono::microseconds &duration,
                                   std::chrono::microseconds &margin, nixl_cost_t &method,
                                   const nixl_opt_args_t *args = nullptr) const override;

private:
    using ConnPtr = std::shared_ptr<corelane::Conn>;

    // False in a process that was forked from the engine's: there, locks may be held for ever by
    // threads that do not exist. What takes no lock is answered by the C API.
    bool isOurs() const;

    ConnPtr find(const std::string &agent) const;
    ConnPtr findOrLoadSelf(const std::string &agent) const;
    nixl_status_t load(const std::string &agent, const std::string &info, ConnPtr &out) const;
    std::mutex &changing(const std::string &agent) const;

    const unsigned born_;
    corelane_engine_t engine_ = 0;
    std::string metadata_;
    int64_t operationTimeoutMs_ = 0;

    // Peers by agent name. Held for a lookup or a change of the map, never while waiting.
    mutable std::shared_mutex connsMutex_;
    mutable std::unordered_map<std::string, ConnPtr> conns_;
    // Registered ranges, by address and length.
    std::mutex registrationsMutex_;
    std::map<std::pair<uintptr_t, size_t>, std::shared_ptr<corelane::Registration>> registrations_;

    // Loading and unloading one name exclude each other.
    mutable std::array<std::mutex, 64> changing_;
};
