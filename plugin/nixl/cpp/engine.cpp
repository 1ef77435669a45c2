#include "engine.h"

#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <pthread.h>

using corelane::Conn;
using corelane::kGraceMs;
using corelane::LocalMD;
using corelane::Registration;
using corelane::RemoteMD;
using corelane::toNixl;

namespace {

// How long `disconnect` waits for the last notifications of a peer: a living one acknowledges within
// some milliseconds, and for a dead one nobody should wait while the agent holds its lock.
constexpr int64_t kGoodbyeMs = 20;

// Counts the forks that lead to this process.
std::atomic<unsigned> forks{0};

unsigned watchForks() {
    static const int watched = pthread_atfork(nullptr, nullptr, [] { ++forks; });
    (void)watched;
    return forks.load();
}

// Fills a string by a function of the C API that takes a buffer, a capacity and the place for the
// length.
template <class Call> corelane_status fill(std::string &out, Call call) {
    char small[512];
    size_t len = 0;
    corelane_status status = call(small, sizeof small, &len);
    if (status == CORELANE_OK) {
        out.assign(small, len);
    } else if (status == CORELANE_ERR_BUFFER_TOO_SMALL) {
        out.resize(len);
        status = call(&out[0], out.size(), &len);
    }
    return status;
}

// No exception leaves a function that NIXL calls: all that can be thrown here is want of memory.
template <class Body> nixl_status_t guarded(Body body) noexcept {
    try {
        return body();
    } catch (...) {
        return NIXL_ERR_BACKEND;
    }
}

// Takes a descriptor over, also when there is no memory for its owner.
RemoteMD *remoteMD(corelane_desc_t descriptor) {
    try {
        return new RemoteMD(descriptor);
    } catch (...) {
        corelane_descriptor_destroy(descriptor);
        throw;
    }
}

} // namespace

nixl_status_t corelane::toNixl(corelane_status status) {
    switch (status) {
    case CORELANE_OK:
        return NIXL_SUCCESS;
    case CORELANE_IN_PROGRESS:
        return NIXL_IN_PROG;
    case CORELANE_ERR_NOT_POSTED:
        return NIXL_ERR_NOT_POSTED;
    case CORELANE_ERR_INVALID_ARGUMENT:
    case CORELANE_ERR_NOT_REGISTERED:
    case CORELANE_ERR_OUT_OF_BOUNDS:
    case CORELANE_ERR_MALFORMED:
    case CORELANE_ERR_LIMIT:
        return NIXL_ERR_INVALID_PARAM;
    case CORELANE_ERR_INVALID_HANDLE:
    case CORELANE_ERR_NOT_FOUND:
        return NIXL_ERR_NOT_FOUND;
    case CORELANE_ERR_STALE_DESCRIPTOR:
    case CORELANE_ERR_CONNECT:
    case CORELANE_ERR_REMOTE_DISCONNECT:
        // On any other status the agent would never forget the peer.
        return NIXL_ERR_REMOTE_DISCONNECT;
    case CORELANE_ERR_PERMISSION:
        return NIXL_ERR_NOT_ALLOWED;
    case CORELANE_ERR_CANCELLED:
        return NIXL_ERR_CANCELED;
    case CORELANE_ERR_BUSY:
    case CORELANE_ERR_BACKPRESSURE:
        // NIXL has no word for a full queue. This one says as well: not now, and nothing is broken.
        return NIXL_ERR_REPOST_ACTIVE;
    case CORELANE_ERR_CONFIG:
        return NIXL_ERR_MISMATCH;
    case CORELANE_ERR_NOT_SUPPORTED:
        return NIXL_ERR_NOT_SUPPORTED;
    default:
        return NIXL_ERR_BACKEND;
    }
}

nixl_mem_list_t corelane::supportedMems() {
    nixl_mem_list_t mems{DRAM_SEG};
    if (corelane_memory_supported(CORELANE_MEMORY_VRAM) == CORELANE_OK) {
        mems.push_back(VRAM_SEG);
    }
    return mems;
}

nixlCorelaneEngine::nixlCorelaneEngine(const nixlBackendInitParams *params)
    : nixlBackendEngine(params), born_(watchForks()) {
    // Whatever goes wrong below has been logged with its reason by the C API.
    initErr = true;
    std::vector<corelane_option> options;
    if (params->customParams != nullptr) {
        for (const auto &param : *params->customParams) {
            options.push_back({param.first.c_str(), param.second.c_str()});
        }
    }
    if (corelane_engine_create(localAgent.data(), localAgent.size(), options.data(), options.size(),
                               &engine_) != CORELANE_OK) {
        return;
    }
    try {
        const corelane_status status = fill(metadata_, [&](void *buffer, size_t room, size_t *len) {
            return corelane_get_metadata(engine_, buffer, room, len);
        });
        std::string timeout;
        const corelane_status known = fill(timeout, [&](void *buffer, size_t room, size_t *len) {
            return corelane_get_option(engine_, "operation_timeout_ms", buffer, room, len);
        });
        operationTimeoutMs_ = std::strtoll(timeout.c_str(), nullptr, 10);
        initErr = status != CORELANE_OK || known != CORELANE_OK;
    } catch (...) {
        // Without memory, and without a destructor that would end the engine.
        corelane_engine_destroy(engine_);
        throw;
    }
}

bool nixlCorelaneEngine::isOurs() const { return forks.load(std::memory_order_relaxed) == born_; }

nixlCorelaneEngine::~nixlCorelaneEngine() {
    if (isOurs()) {
        conns_.clear();
    }
    // Ends all transfers and waits until nothing touches memory any more; frees every handle.
    if (engine_ != 0) {
        corelane_engine_destroy(engine_);
    }
}

// --- peers

std::mutex &nixlCorelaneEngine::changing(const std::string &agent) const {
    return changing_[std::hash<std::string>{}(agent) % changing_.size()];
}

nixlCorelaneEngine::ConnPtr nixlCorelaneEngine::find(const std::string &agent) const {
    if (!isOurs()) {
        return nullptr;
    }
    std::shared_lock<std::shared_mutex> lock(connsMutex_);
    const auto found = conns_.find(agent);
    return found == conns_.end() ? nullptr : found->second;
}

// An agent always knows itself, also after it was told to disconnect from itself.
nixlCorelaneEngine::ConnPtr nixlCorelaneEngine::findOrLoadSelf(const std::string &agent) const {
    ConnPtr conn = find(agent);
    if (conn == nullptr && agent == localAgent && isOurs()) {
        std::lock_guard<std::mutex> change(changing(agent));
        conn = find(agent);
        if (conn == nullptr) {
            load(agent, metadata_, conn);
        }
    }
    return conn;
}

// Loads a peer under the name that its metadata has, which must be the name that NIXL knows it by.
nixl_status_t nixlCorelaneEngine::load(const std::string &agent, const std::string &info,
                                       ConnPtr &out) const {
    corelane_conn_t handle = 0;
    const corelane_status status = corelane_load_peer_as(
        engine_, agent.data(), agent.size(), info.data(), info.size(), &handle);
    if (status != CORELANE_OK) {
        return toNixl(status);
    }
    try {
        out = std::make_shared<Conn>(handle);
    } catch (...) {
        corelane_conn_destroy(handle);
        throw;
    }
    ConnPtr before = out;
    {
        std::unique_lock<std::shared_mutex> lock(connsMutex_);
        std::swap(conns_[agent], before);
    }
    return NIXL_SUCCESS;
}

nixl_status_t nixlCorelaneEngine::getConnInfo(std::string &out) const {
    return guarded([&] {
        out = metadata_;
        return NIXL_SUCCESS;
    });
}

nixl_status_t nixlCorelaneEngine::loadRemoteConnInfo(const std::string &agent,
                                                     const std::string &info) {
    return guarded([&] {
        if (!isOurs()) {
            return NIXL_ERR_BACKEND;
        }
        std::lock_guard<std::mutex> change(changing(agent));
        ConnPtr conn;
        return load(agent, info, conn);
    });
}

nixl_status_t nixlCorelaneEngine::connect(const std::string &agent) {
    return guarded([&] {
        const ConnPtr conn = findOrLoadSelf(agent);
        if (conn == nullptr) {
            return NIXL_ERR_NOT_FOUND;
        }
        // To oneself, the first transfer connects: nothing can be found out before.
        return agent == localAgent ? NIXL_SUCCESS : toNixl(corelane_connect(conn->handle(), -1));
    });
}

nixl_status_t nixlCorelaneEngine::disconnect(const std::string &agent) {
    return guarded([&] {
        if (!isOurs()) {
            return NIXL_ERR_BACKEND;
        }
        std::lock_guard<std::mutex> change(changing(agent));
        ConnPtr conn;
        {
            std::unique_lock<std::shared_mutex> lock(connsMutex_);
            const auto found = conns_.find(agent);
            if (found == conns_.end()) {
                return agent == localAgent ? NIXL_SUCCESS : NIXL_ERR_NOT_FOUND;
            }
            conn = found->second;
            conns_.erase(found);
        }
        return toNixl(conn->unload(kGoodbyeMs));
    });
}

// --- memory

nixl_status_t nixlCorelaneEngine::registerMem(const nixlBlobDesc &mem, const nixl_mem_t &type,
                                              nixlBackendMD *&out) {
    return guarded([&] {
        out = nullptr;
        if (type != DRAM_SEG && type != VRAM_SEG) {
            return NIXL_ERR_NOT_SUPPORTED;
        }
        // The device number of host memory says nothing to this backend.
        const uint32_t kind = type == VRAM_SEG ? CORELANE_MEMORY_VRAM : CORELANE_MEMORY_DRAM;
        const uint32_t device = type == VRAM_SEG ? static_cast<uint32_t>(mem.devId) : 0;
        const std::pair<uintptr_t, size_t> range(mem.addr, mem.len);
        if (!isOurs()) {
            return NIXL_ERR_BACKEND;
        }
        std::lock_guard<std::mutex> lock(registrationsMutex_);
        const auto known = registrations_.find(range);
        if (known != registrations_.end()) {
            if (known->second->kind != kind || known->second->device != device) {
                return NIXL_ERR_INVALID_PARAM;
            }
            out = new LocalMD(range, known->second);
            ++known->second->count;
            return NIXL_SUCCESS;
        }
        // All memory that this takes is there before the registration is.
        const auto registration = std::make_shared<Registration>();
        registration->descriptor.reserve(256);
        registration->kind = kind;
        registration->device = device;
        auto local = std::make_unique<LocalMD>(range, registration);
        const auto place = registrations_.emplace(range, registration).first;
        corelane_status status = corelane_reg(
            engine_, reinterpret_cast<void *>(mem.addr), mem.len, kind, device,
            CORELANE_ACCESS_REMOTE_READ | CORELANE_ACCESS_REMOTE_WRITE, &registration->region);
        if (status == CORELANE_OK) {
            status = fill(registration->descriptor, [&](void *buffer, size_t room, size_t *len) {
                return corelane_get_descriptor(registration->region, buffer, room, len);
            });
        }
        if (status != CORELANE_OK) {
            registrations_.erase(place);
            if (registration->region != 0) {
                corelane_mr_destroy(registration->region);
            }
            return toNixl(status);
        }
        out = local.release();
        return NIXL_SUCCESS;
    });
}

nixl_status_t nixlCorelaneEngine::deregisterMem(nixlBackendMD *meta) {
    return guarded([&] {
        if (meta == nullptr) {
            return NIXL_ERR_INVALID_PARAM;
        }
        if (!isOurs()) {
            return NIXL_ERR_BACKEND;
        }
        LocalMD *local = static_cast<LocalMD *>(meta);
        const std::shared_ptr<Registration> registration = local->registration;
        {
            std::lock_guard<std::mutex> lock(registrationsMutex_);
            if (registration->count > 1) {
                --registration->count;
                delete local;
                return NIXL_SUCCESS;
            }
            // Who registers the range from now on gets a region of its own.
            const auto known = registrations_.find(local->range);
            if (known != registrations_.end() && known->second == registration) {
                registrations_.erase(known);
            }
        }
        // The agent does not look at the answer, and its caller frees the memory next: so this waits
        // until nothing touches it, which no transfer can put off beyond the operation timeout.
        const auto deadline = std::chrono::steady_clock::now() +
                              std::chrono::milliseconds(operationTimeoutMs_ + kGraceMs);
        corelane_status status = corelane_mr_destroy(registration->region);
        while (status == CORELANE_ERR_BUSY && std::chrono::steady_clock::now() < deadline) {
            status = corelane_mr_destroy(registration->region);
        }
        if (status == CORELANE_ERR_BUSY) {
            // Kept: it can be deregistered again.
            return NIXL_ERR_BACKEND;
        }
        delete local;
        return toNixl(status);
    });
}

nixl_status_t nixlCorelaneEngine::getPublicData(const nixlBackendMD *meta, std::string &out) const {
    return guarded([&] {
        if (meta == nullptr) {
            return NIXL_ERR_INVALID_PARAM;
        }
        out = static_cast<const LocalMD *>(meta)->registration->descriptor;
        return NIXL_SUCCESS;
    });
}

nixl_status_t nixlCorelaneEngine::loadRemoteMD(const nixlBlobDesc &input, const nixl_mem_t &type,
                                               const std::string &agent, nixlBackendMD *&output) {
    return guarded([&] {
        output = nullptr;
        if (type != DRAM_SEG && type != VRAM_SEG) {
            return NIXL_ERR_NOT_SUPPORTED;
        }
        // The peer need not be known yet: what the descriptor says is checked when it is used.
        corelane_desc_t descriptor = 0;
        const corelane_status status = corelane_import_descriptor(
            engine_, input.metaInfo.data(), input.metaInfo.size(), &descriptor);
        if (status == CORELANE_OK) {
            output = remoteMD(descriptor);
        }
        return toNixl(status);
    });
}

nixl_status_t nixlCorelaneEngine::loadLocalMD(nixlBackendMD *input, nixlBackendMD *&output) {
    return guarded([&] {
        output = nullptr;
        if (input == nullptr) {
            return NIXL_ERR_INVALID_PARAM;
        }
        const std::string &bytes = static_cast<LocalMD *>(input)->registration->descriptor;
        corelane_desc_t descriptor = 0;
        const corelane_status status =
            corelane_import_descriptor(engine_, bytes.data(), bytes.size(), &descriptor);
        if (status == CORELANE_OK) {
            output = remoteMD(descriptor);
        }
        return toNixl(status);
    });
}

nixl_status_t nixlCorelaneEngine::unloadMD(nixlBackendMD *input) {
    return guarded([&] {
        delete static_cast<RemoteMD *>(input);
        return NIXL_SUCCESS;
    });
}

nixl_status_t nixlCorelaneEngine::queryMem(const nixl_reg_dlist_t &descs,
                                           std::vector<nixl_query_resp_t> &answers) const {
    return guarded([&] {
        answers.clear();
        answers.reserve(static_cast<size_t>(descs.descCount()));
        for (int at = 0; at < descs.descCount(); ++at) {
            const nixlBlobDesc &desc = descs[static_cast<size_t>(at)];
            corelane_region_info info{};
            const corelane_status status =
                descs.getType() == DRAM_SEG
                    ? corelane_query_memory(engine_, reinterpret_cast<const void *>(desc.addr),
                                            desc.len, &info)
                    : CORELANE_ERR_NOT_FOUND;
            if (status == CORELANE_OK) {
                nixl_b_params_t region;
                region.emplace("addr", std::to_string(info.addr));
                region.emplace("len", std::to_string(info.len));
                region.emplace("mem_type", "DRAM");
                answers.emplace_back(std::move(region));
            } else if (status == CORELANE_ERR_NOT_FOUND) {
                answers.emplace_back(std::nullopt);
            } else {
                return toNixl(status);
            }
        }
        return NIXL_SUCCESS;
    });
}

// --- notifications

nixl_status_t nixlCorelaneEngine::getNotifs(notif_list_t &list) {
    return guarded([&] {
        struct Taken {
            notif_list_t &list;
            bool complete;
        } taken{list, true};
        const auto take = [](void *context, const char *from, size_t fromLen, const void *payload,
                             size_t payloadLen) {
            auto *taken = static_cast<Taken *>(context);
            try {
                taken->list.emplace_back(
                    std::string(from, fromLen),
                    std::string(static_cast<const char *>(payload), payloadLen));
            } catch (...) {
                taken->complete = false;
            }
        };
        const corelane_status status = corelane_get_notifs(engine_, take, &taken, nullptr);
        return taken.complete ? toNixl(status) : NIXL_ERR_BACKEND;
    });
}

nixl_status_t nixlCorelaneEngine::genNotif(const std::string &agent,
                                           const std::string &message) const {
    return guarded([&] {
        const ConnPtr conn = findOrLoadSelf(agent);
        if (conn == nullptr) {
            return isOurs() ? NIXL_ERR_NOT_FOUND : NIXL_ERR_BACKEND;
        }
        return toNixl(corelane_send_notif(conn->handle(), message.data(), message.size()));
    });
}
