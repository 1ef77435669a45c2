// Requests: preparing, posting, asking, releasing.

#include "engine.h"

#include <vector>

using corelane::Request;
using corelane::kGraceMs;
using corelane::toNixl;

namespace {

// Segments of two lists that a thread keeps room for: 0.8 MiB.
constexpr size_t kKeptSegments = 16384;

const nixlBasicDesc &first(const nixl_meta_dlist_t &list) { return list[0]; }

const nixlBasicDesc &last(const nixl_meta_dlist_t &list) {
    return list[static_cast<size_t>(list.descCount()) - 1];
}

uint32_t operationOf(nixl_xfer_op_t operation) {
    return operation == NIXL_READ ? CORELANE_READ : CORELANE_WRITE;
}

} // namespace

Request::Request(corelane_xfer_t xfer, nixl_xfer_op_t operation, const nixl_meta_dlist_t &local,
                 const nixl_meta_dlist_t &remote)
    : xfer(xfer), operation_(operation), count_(local.descCount()), firstLocal_(first(local)),
      lastLocal_(last(local)), firstRemote_(first(remote)), lastRemote_(last(remote)) {}

// What a descriptor's addresses are of; which kind of memory, the registrations know.
static bool isMemory(nixl_mem_t type) { return type == DRAM_SEG || type == VRAM_SEG; }

bool Request::matches(nixl_xfer_op_t operation, const nixl_meta_dlist_t &local,
                      const nixl_meta_dlist_t &remote) const {
    return operation == operation_ && local.descCount() == count_ && remote.descCount() == count_ &&
           Range(first(local)) == firstLocal_ && Range(last(local)) == lastLocal_ &&
           Range(first(remote)) == firstRemote_ && Range(last(remote)) == lastRemote_;
}

nixl_status_t nixlCorelaneEngine::prepXfer(const nixl_xfer_op_t &operation,
                                           const nixl_meta_dlist_t &local,
                                           const nixl_meta_dlist_t &remote,
                                           const std::string &agent, nixlBackendReqH *&handle,
                                           const nixl_opt_b_args_t *args) const {
    try {
        handle = nullptr;
        if (local.descCount() != remote.descCount() || local.descCount() == 0 ||
            !isMemory(local.getType()) || !isMemory(remote.getType())) {
            return NIXL_ERR_INVALID_PARAM;
        }
        const ConnPtr conn = findOrLoadSelf(agent);
        if (conn == nullptr) {
            return NIXL_ERR_NOT_FOUND;
        }
        const size_t count = static_cast<size_t>(local.descCount());
        // Kept between calls: growing and trimming the heap for them took longer than all the rest.
        thread_local std::vector<corelane_local_segment> own;
        thread_local std::vector<corelane_remote_segment> theirs;
        own.resize(count);
        theirs.resize(count);
        for (size_t at = 0; at < count; ++at) {
            const nixlMetaDesc &source = local[at], &target = remote[at];
            if (source.metadataP == nullptr || target.metadataP == nullptr) {
                return NIXL_ERR_INVALID_PARAM;
            }
            own[at] = {source.addr, source.len,
                       static_cast<corelane::LocalMD *>(source.metadataP)->registration->region};
            theirs[at] = {static_cast<corelane::RemoteMD *>(target.metadataP)->descriptor,
                          target.addr, target.len};
        }
        corelane_xfer_t xfer = 0;
        const corelane_status status = corelane_prepare(
            conn->handle(), operationOf(operation), own.data(), theirs.data(), count, &xfer);
        if (count > kKeptSegments) {
            own = {};
            theirs = {};
        }
        if (status != CORELANE_OK) {
            return toNixl(status);
        }
        try {
            handle = new Request(xfer, operation, local, remote);
        } catch (...) {
            corelane_release(xfer, 0);
            throw;
        }
        return NIXL_SUCCESS;
    } catch (...) {
        return NIXL_ERR_BACKEND;
    }
}

// Costs what corelane_post does: a handle lookup and a message to the lane, whatever the length of
// the lists.
nixl_status_t nixlCorelaneEngine::postXfer(const nixl_xfer_op_t &operation,
                                           const nixl_meta_dlist_t &local,
                                           const nixl_meta_dlist_t &remote,
                                           const std::string &agent, nixlBackendReqH *&handle,
                                           const nixl_opt_b_args_t *args) const {
    auto *request = static_cast<Request *>(handle);
    if (request == nullptr || !request->matches(operation, local, remote)) {
        return NIXL_ERR_INVALID_PARAM;
    }
    const corelane_status status =
        args != nullptr && args->hasNotif
            ? corelane_post_notify(request->xfer, args->notifMsg.data(), args->notifMsg.size())
            : corelane_post(request->xfer);
    if (status != CORELANE_OK) {
        return toNixl(status);
    }
    // Small transfers to a peer of this host were copied while they were posted: saves the question.
    return corelane_xfer_peek(request->xfer) == CORELANE_OK ? NIXL_SUCCESS : NIXL_IN_PROG;
}

nixl_status_t nixlCorelaneEngine::checkXfer(nixlBackendReqH *handle) const {
    if (handle == nullptr) {
        return NIXL_ERR_INVALID_PARAM;
    }
    return toNixl(corelane_xfer_status(static_cast<Request *>(handle)->xfer));
}

nixl_status_t nixlCorelaneEngine::releaseReqH(nixlBackendReqH *handle) const {
    if (handle == nullptr) {
        return NIXL_ERR_INVALID_PARAM;
    }
    auto *request = static_cast<Request *>(handle);
    // The first call must not wait. The agent does not look at the answer of a second one, so that
    // one does: every transfer ends within the operation timeout.
    const bool again = request->releasing.exchange(true);
    const int64_t timeout = again ? operationTimeoutMs_ + kGraceMs : 0;
    if (corelane_release(request->xfer, timeout) == CORELANE_ERR_BUSY) {
        return NIXL_ERR_REPOST_ACTIVE;
    }
    // Freed now, or with its engine before.
    delete request;
    return NIXL_SUCCESS;
}

nixl_status_t nixlCorelaneEngine::estimateXferCost(
    const nixl_xfer_op_t &operation, const nixl_meta_dlist_t &local, const nixl_meta_dlist_t &remote,
    const std::string &agent, nixlBackendReqH *const &handle, std::chrono::microseconds &duration,
    std::chrono::microseconds &margin, nixl_cost_t &method, const nixl_opt_args_t *args) const {
    if (handle == nullptr) {
        return NIXL_ERR_INVALID_PARAM;
    }
    uint64_t nanoseconds = 0, doubt = 0;
    const corelane_status status =
        corelane_estimate(static_cast<Request *>(handle)->xfer, &nanoseconds, &doubt);
    if (status == CORELANE_ERR_NOT_FOUND) {
        return NIXL_ERR_NOT_SUPPORTED;
    }
    if (status != CORELANE_OK) {
        return toNixl(status);
    }
    // Rounded up: no transfer takes no time.
    const auto microseconds = [](uint64_t ns) {
        return std::chrono::microseconds(static_cast<int64_t>((ns + 999) / 1000));
    };
    duration = microseconds(nanoseconds);
    margin = microseconds(doubt);
    method = nixl_cost_t::ANALYTICAL_BACKEND;
    return NIXL_SUCCESS;
}
