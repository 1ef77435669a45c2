/*
 * A process that forks after it has made an engine, against all advice: every call of the child must
 * come back with an error, at once, and the parent must not notice.
 */

#define _POSIX_C_SOURCE 200809L

#include <corelane.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LEN = 1 << 20, WAIT_MS = 30000 };

static void expect(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "%ld: %s: %s\n", (long)getpid(), what, corelane_last_error());
        _exit(1);
    }
}

static void on_notification(void *context, const char *from, size_t from_len, const void *payload,
                            size_t payload_len)
{
    (void)from;
    (void)from_len;
    (void)payload;
    (void)payload_len;
    *(int *)context += 1;
}

static corelane_engine_t create(const char *name)
{
    corelane_option option = {"listen", "127.0.0.1"};
    corelane_engine_t engine = 0;
    expect(corelane_engine_create(name, strlen(name), &option, 1, &engine) == CORELANE_OK, name);
    return engine;
}

static int refusals = 0;

/* The engine is the parent's: that, or the transfer's own end, is all that a child is told. */
static void refused(corelane_status status, const char *what)
{
    expect(status == CORELANE_ERR_SHUTDOWN, what);
    expect(corelane_last_error()[0] != '\0', what);
    refusals++;
}

int main(void)
{
    static unsigned char from[LEN], to[LEN];
    unsigned char metadata[4096], descriptor[4096];
    size_t metadata_len = 0, descriptor_len = 0, count = 0;
    corelane_engine_t far = create("far"), near = create("near"), own = 0;
    corelane_region_t region = 0, near_region = 0, allocated = 0, none = 0;
    void *memory = NULL, *nothing = NULL;
    corelane_conn_t conn = 0, other = 0;
    corelane_desc_t desc = 0;
    corelane_xfer_t xfer = 0, unposted = 0, another = 0;
    corelane_engine_stats stats;
    int seen = 0, status = 0;
    pid_t child;

    memset(from, 7, LEN);
    expect(corelane_reg(far, from, LEN, 0, 0, CORELANE_ACCESS_REMOTE_READ, &region) == 0, "reg");
    expect(corelane_reg(near, to, LEN, 0, 0, CORELANE_ACCESS_LOCAL, &near_region) == 0, "reg");
    expect(corelane_alloc(near, LEN, CORELANE_ACCESS_LOCAL, &memory, &allocated) == 0, "alloc");
    memset(memory, 5, LEN);
    expect(corelane_get_metadata(far, metadata, sizeof metadata, &metadata_len) == 0, "metadata");
    expect(corelane_get_descriptor(region, descriptor, sizeof descriptor, &descriptor_len) == 0,
           "descriptor");
    expect(corelane_load_peer(near, metadata, metadata_len, &conn) == 0, "load");
    expect(corelane_import_descriptor(near, descriptor, descriptor_len, &desc) == 0, "import");
    expect(corelane_read(conn, (uint64_t)(uintptr_t)to, desc, (uint64_t)(uintptr_t)from, LEN,
                         &unposted) == 0,
           "read");
    expect(corelane_xfer_wait(unposted, WAIT_MS) == 0, "wait");
    expect(corelane_read(conn, (uint64_t)(uintptr_t)to, desc, (uint64_t)(uintptr_t)from, LEN,
                         &xfer) == 0,
           "read");

    child = fork();
    expect(child >= 0, "fork");
    if (child == 0) {
        refused(corelane_reg(near, to, LEN, 0, 0, 0, &none), "reg");
        refused(corelane_mr_destroy(near_region), "mr_destroy");
        refused(corelane_alloc(near, LEN, 0, &nothing, &none), "alloc");
        refused(corelane_free(allocated), "free");
        refused(corelane_load_peer(near, metadata, metadata_len, &other), "load_peer");
        refused(corelane_load_peer_as(near, "far", 3, metadata, metadata_len, &other),
                "load_peer_as");
        refused(corelane_connect(conn, WAIT_MS), "connect");
        refused(corelane_disconnect(conn, NULL), "disconnect");
        refused(corelane_accept(near, -1, &other), "accept");
        refused(corelane_stop_accept(near), "stop_accept");
        refused(corelane_start_listener(near), "start_listener");
        refused(corelane_send_notif(conn, "child", 5), "send_notif");
        refused(corelane_get_notifs(near, on_notification, &seen, &count), "get_notifs");
        refused(corelane_wait_notifs(near, -1, on_notification, &seen, &count), "wait_notifs");
        refused(corelane_read(conn, (uint64_t)(uintptr_t)to, desc, (uint64_t)(uintptr_t)from, LEN,
                              &another),
                "read");
        refused(corelane_post(unposted), "post");
        refused(corelane_post_notify(unposted, "child", 5), "post_notify");
        if (corelane_xfer_status(xfer) != CORELANE_OK) { /* it may have been faster than the fork */
            expect(corelane_xfer_status(xfer) == CORELANE_ERR_SHUTDOWN, "xfer_status");
            expect(corelane_xfer_wait(xfer, -1) == CORELANE_ERR_SHUTDOWN, "xfer_wait");
        }
        expect(corelane_xfer_status(unposted) == CORELANE_OK, "status of what had ended");
        expect(corelane_cancel(xfer) == CORELANE_OK, "cancel");
        expect(corelane_release(xfer, -1) <= CORELANE_OK, "release");
        refused(corelane_unload_peer(conn, -1), "unload_peer");
        /* What is only read may be read. */
        expect(corelane_stats(near, &stats, sizeof stats) <= CORELANE_OK, "stats");
        expect(corelane_get_metadata(near, metadata, sizeof metadata, &metadata_len) <= 0,
               "get_metadata");
        expect(corelane_query_memory(near, to, 1, (corelane_region_info *)(void *)&stats) < 0,
               "query_memory");
        refused(corelane_engine_destroy(near), "engine_destroy");
        refused(corelane_engine_destroy(far), "engine_destroy");
        expect(corelane_engine_destroy(far) == CORELANE_ERR_INVALID_HANDLE, "twice");
        refusals += 2; /* the two of the next lines */
        /* A child can have engines of its own. */
        own = create("own");
        expect(corelane_load_peer(own, metadata, metadata_len, &conn) == CORELANE_OK, "own peer");
        expect(corelane_engine_destroy(own) == CORELANE_OK, "own engine");
        printf("child: %d calls refused\n", refusals);
        fflush(stdout);
        exit(0); /* with all exit handlers: they must not wait for lanes that are not here */
    }

    expect(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0,
           "the child");
    expect(corelane_xfer_wait(xfer, WAIT_MS) == CORELANE_OK, "the parent's transfer");
    memset(to, 0, LEN);
    expect(corelane_post_notify(unposted, "parent", 6) == CORELANE_OK, "post");
    expect(corelane_xfer_wait(unposted, WAIT_MS) == CORELANE_OK, "wait");
    expect(memcmp(from, to, LEN) == 0, "the bytes");
    while (seen == 0) {
        expect(corelane_wait_notifs(far, WAIT_MS, on_notification, &seen, &count) == 0 && count > 0,
               "the notification");
    }
    expect(seen == 1, "one notification");
    expect(corelane_stats(near, &stats, sizeof stats) == 0 && stats.links_down == 0, "links");
    expect(corelane_mr_destroy(near_region) == 0, "mr_destroy");
    expect(*(unsigned char *)memory == 5 && corelane_free(allocated) == 0, "free");
    expect(corelane_engine_destroy(near) == 0 && corelane_engine_destroy(far) == 0, "destroy");
    printf("parent: served\n");
    return 0;
}
