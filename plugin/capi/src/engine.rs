//! Engines.

use std::ffi::{c_char, c_void};
use std::sync::Once;

use corelane::{Engine, Error};
use tracing::level_filters::LevelFilter;

use crate::allocation::end_with_engine;
use crate::handles::{
    CONNS, ENGINES, EngineEntry, adopt, corelane_conn_t, corelane_engine_t, free_any,
};
use crate::log;
use crate::options::{Resolved, corelane_option, level_of, resolve, strange_variables};
use crate::raw;
use crate::status::{Failure, corelane_status, run};

/// The version of this library, such as `0.1.0`. Never freed.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

fn warn_of_strange_variables() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        for name in strange_variables(names) {
            tracing::warn!(
                "environment variable {name} is no option of corelane and has no effect"
            );
        }
    });
}

/// Starts an engine: its lanes and its listener. Takes some milliseconds.
///
/// `agent_name` (`agent_name_len` bytes of UTF-8, 1..=1024) is what peers see as the sender of
/// notifications. `options` are `option_count` names with values; see `corelane_option_at`. What is
/// not given is taken from the environment (`CORELANE_<OPTION>`), then from the defaults. The
/// engine's handle is stored in `*engine`, or 0 when there is none.
///
/// Any thread. Errors: `CORELANE_ERR_CONFIG` (unknown option, malformed value, length of the name;
/// with what would be valid), `CORELANE_ERR_LANE` (`io_uring` forbidden, core outside the affinity
/// mask, ...), `CORELANE_ERR_IO` (port in use, ...), `CORELANE_ERR_INVALID_ARGUMENT`,
/// `CORELANE_ERR_LIMIT`. Then nothing is left behind.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_engine_create(
    agent_name: *const c_char,
    agent_name_len: usize,
    options: *const corelane_option,
    option_count: usize,
    engine: *mut corelane_engine_t,
) -> corelane_status {
    run("corelane_engine_create", || {
        // SAFETY: the caller promises that the pointers are valid for their lengths.
        let (name, options) = unsafe {
            raw::store(engine, 0, "engine")?;
            (
                raw::text(agent_name, agent_name_len, "the agent name")?,
                raw::slice(options, option_count, "options")?,
            )
        };
        let mut given = Vec::with_capacity(options.len());
        for option in options {
            // SAFETY: as above; both are strings.
            let (name, value) = unsafe {
                (
                    raw::string(option.name, "the name of an option")?,
                    raw::string(option.value, "the value of an option")?,
                )
            };
            given.push((name, value));
        }
        let environment = |name: &str| std::env::var(name).ok();
        let Resolved { settings, values } = resolve(&given, environment).inspect_err(|_| {
            // The reason must be readable, unless somebody said that none should be.
            log::set_first_level(level_of(&given, environment).unwrap_or(LevelFilter::WARN));
        })?;
        let level = settings.log_level;
        let before = log::set_level(level);
        warn_of_strange_variables();
        let handle = Engine::new(name, settings.config)
            .map_err(Failure::from)
            .and_then(|engine| ENGINES.insert(EngineEntry::new(engine, values)))
            // The level is that of the engines that there are.
            .inspect_err(|_| log::take_back(level, before))?;
        // SAFETY: as above.
        unsafe { raw::store(engine, handle, "engine") }
    })
}

/// Shuts an engine down: notifications are flushed for at most `linger_ms`, transfers end, lanes
/// stop. When it returns `CORELANE_OK`, nothing touches registered memory any more, and memory of
/// `corelane_alloc` is no longer there. All handles of the engine are freed.
///
/// Any thread but a lane. Errors: `CORELANE_ERR_INVALID_HANDLE`; `CORELANE_ERR_LANE` when a lane had
/// failed, or did not stop in time, and `CORELANE_ERR_BUSY` when a process of this host is stopped in
/// the middle of a copy (the handles are gone all the same; registered memory must stay mapped, and
/// that of `corelane_alloc` does); `CORELANE_ERR_SHUTDOWN` in a forked child: only the handle of the
/// engine is freed.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_engine_destroy(engine: corelane_engine_t) -> corelane_status {
    run("corelane_engine_destroy", || {
        let entry = ENGINES.get(engine)?;
        if !entry.ends() {
            return Err(Failure::handle("engine", engine));
        }
        ENGINES.remove(engine);
        // In a forked child a lock may be held by a thread that only the parent has.
        if let Err(error @ Error::Shutdown) = entry.engine.check_usable() {
            return Err(error.into());
        }
        let buffers = entry.take_children().into_iter().filter_map(free_any).collect();
        let outcome = entry.engine.shutdown();
        end_with_engine(buffers, outcome.is_ok());
        Ok(outcome?)
    })
}

/// What a peer needs to connect (agent name, addresses, secret), to be sent over a channel that you
/// trust: who holds it can connect. The same bytes on every call.
///
/// `*len` is set to the length, also when `capacity` is too small: call with a capacity of 0 to learn
/// it. Any thread, also in a forked child. Errors: `CORELANE_ERR_BUFFER_TOO_SMALL`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_get_metadata(
    engine: corelane_engine_t,
    buffer: *mut c_void,
    capacity: usize,
    len: *mut usize,
) -> corelane_status {
    run("corelane_get_metadata", || {
        let metadata = ENGINES.get(engine)?.engine.metadata();
        // SAFETY: the caller promises a buffer of `capacity` bytes.
        unsafe { raw::fill(&metadata, buffer, capacity, len) }
    })
}

/// The value of an option that is in effect in this engine, without a final zero byte; lengths as in
/// `corelane_get_metadata`.
///
/// Any thread. Errors: `CORELANE_ERR_NOT_FOUND`, `CORELANE_ERR_BUFFER_TOO_SMALL`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_get_option(
    engine: corelane_engine_t,
    name: *const c_char,
    buffer: *mut c_void,
    capacity: usize,
    len: *mut usize,
) -> corelane_status {
    run("corelane_get_option", || {
        // SAFETY: the caller promises a string.
        let name = unsafe { raw::string(name, "name")? };
        let entry = ENGINES.get(engine)?;
        let (_, value) =
            entry.options.iter().find(|(known, _)| *known == name).ok_or_else(|| {
                Failure::new(
                    corelane_status::CORELANE_ERR_NOT_FOUND,
                    format!("there is no option `{name}`"),
                )
            })?;
        // SAFETY: the caller promises a buffer of `capacity` bytes.
        unsafe { raw::fill(value.as_bytes(), buffer, capacity, len) }
    })
}

/// Waits for at most `timeout_ms` (negative: without limit) for a peer that connects by itself and
/// was not returned here before. Never needed: the lanes accept by themselves, such peers are
/// served, and their notifications arrive.
///
/// Any thread but a lane. Errors: `CORELANE_ERR_TIMEOUT`; `CORELANE_ERR_CANCELLED` after
/// `corelane_stop_accept`, once nobody is left to return; `CORELANE_ERR_SHUTDOWN` (also when the
/// engine is destroyed meanwhile); `CORELANE_ERR_BACKEND` after a lane has failed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn corelane_accept(
    engine: corelane_engine_t,
    timeout_ms: i64,
    conn: *mut corelane_conn_t,
) -> corelane_status {
    run("corelane_accept", || {
        // SAFETY: the caller promises room for a handle.
        unsafe { raw::store(conn, 0, "conn")? };
        // Not held while waiting: the engine may be destroyed meanwhile.
        let api = ENGINES.get(engine)?.engine.clone();
        let peer = api.accept(raw::timeout(timeout_ms))?;
        let handle = adopt(&CONNS, engine, peer)?;
        // SAFETY: as above.
        unsafe { raw::store(conn, handle, "conn") }
    })
}

/// Refuses peers that are not known yet, and ends `corelane_accept`. Known peers go on, and may
/// connect again.
///
/// Any thread. Errors: `CORELANE_ERR_SHUTDOWN` in a forked child; `CORELANE_ERR_BACKEND` after a lane
/// has failed.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_stop_accept(engine: corelane_engine_t) -> corelane_status {
    run("corelane_stop_accept", || Ok(ENGINES.get(engine)?.engine.stop_accepting()?))
}

/// Accepts new peers again, after `corelane_stop_accept`. An engine does from its creation.
///
/// Any thread. Errors: as of `corelane_stop_accept`.
#[unsafe(no_mangle)]
pub extern "C" fn corelane_start_listener(engine: corelane_engine_t) -> corelane_status {
    run("corelane_start_listener", || Ok(ENGINES.get(engine)?.engine.start_accepting()?))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn create(name: &str) -> corelane_engine_t {
        let options = [(c"listen", c"127.0.0.1"), (c"log_level", c"off")]
            .map(|(name, value)| corelane_option { name: name.as_ptr(), value: value.as_ptr() });
        let mut engine = 0;
        // SAFETY: all pointers are valid for their lengths.
        let status = unsafe {
            corelane_engine_create(
                name.as_ptr().cast(),
                name.len(),
                options.as_ptr(),
                options.len(),
                &raw mut engine,
            )
        };
        assert_eq!(status, corelane_status::CORELANE_OK);
        engine
    }

    /// The status with which a child ends that destroys the engine; a child that hangs is killed.
    fn destroy_in_child(engine: corelane_engine_t) -> i32 {
        // SAFETY: the child does nothing but what is asked of the library, and ends at once.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            // SAFETY: plain integers.
            unsafe { libc::alarm(20) };
            let refused = corelane_engine_destroy(engine) == corelane_status::CORELANE_ERR_SHUTDOWN;
            let gone =
                corelane_engine_destroy(engine) == corelane_status::CORELANE_ERR_INVALID_HANDLE;
            // SAFETY: as above.
            unsafe { libc::_exit(if refused && gone { 7 } else { 8 }) };
        }
        let mut status = 0;
        // SAFETY: our own child, and room for its status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        status
    }

    #[test]
    fn a_forked_child_that_destroys_an_engine_waits_for_no_lock_of_its_parent() {
        let engine = create("near");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let entry = ENGINES.get(engine).unwrap();
                    // Nearly always one of them holds the lock.
                    while !done.load(Ordering::Relaxed) {
                        entry.take_children();
                    }
                });
            }
            let statuses: Vec<i32> = (0..20).map(|_| destroy_in_child(engine)).collect();
            done.store(true, Ordering::Relaxed);
            assert!(
                statuses
                    .iter()
                    .all(|status| libc::WEXITSTATUS(*status) == 7 && libc::WIFEXITED(*status)),
                "{statuses:?}"
            );
        });
        assert_eq!(corelane_engine_destroy(engine), corelane_status::CORELANE_OK);
    }
}
