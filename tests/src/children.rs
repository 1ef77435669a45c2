//! Processes as a hostile neighbour makes them: with less rights, with another's number, with another's descriptors.

use std::ffi::CString;
use std::io;
use std::time::{Duration, Instant};

use crate::{BOUND, PeerProcess, eventually};

fn told(what: &str, result: libc::c_long) -> Result<libc::c_long, String> {
    if result >= 0 { Ok(result) } else { Err(format!("{what}: {}", io::Error::last_os_error())) }
}

/// Makes this process one of another user, for good. Without root's rights it is refused.
pub(crate) fn become_user(id: u32) -> Result<(), String> {
    // SAFETY: no groups, so that nothing is read.
    told("setgroups", unsafe { libc::setgroups(0, std::ptr::null()) }.into())?;
    // SAFETY: no pointers.
    told("setresgid", unsafe { libc::setresgid(id, id, id) }.into())?;
    // SAFETY: no pointers.
    told("setresuid", unsafe { libc::setresuid(id, id, id) }.into())?;
    // The kernel takes this wish back when the user changes.
    // SAFETY: prctl with these arguments only sets a flag of this process.
    told("prctl", unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }.into())?;
    Ok(())
}

/// A network of its own, without any way out, for this thread and those that it makes.
pub(crate) fn leave_network() -> Result<(), String> {
    // SAFETY: no pointers.
    told("unshare", unsafe { libc::unshare(libc::CLONE_NEWNET) }.into()).map(|_| ())
}

/// Whether processes of the same user may reach into this one.
pub(crate) fn set_dumpable(dumpable: bool) -> Result<(), String> {
    // SAFETY: prctl with these arguments only sets a flag of this process.
    let result = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, libc::c_ulong::from(dumpable)) };
    told("prctl", result.into()).map(|_| ())
}

/// From now on nobody learns by its robust futexes that this thread has ended: the kernel does not know of them.
pub(crate) fn forget_robust_futexes() -> Result<(), String> {
    // What the kernel knows a list by is the size of its head: three words.
    let size = 3 * size_of::<usize>();
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: without a list nothing is read when the thread ends.
    told("set_robust_list", unsafe { libc::syscall(libc::SYS_set_robust_list, none, size) })
        .map(|_| ())
}

/// A child with copies of this process's memory and descriptors, which sleeps until it is killed.
pub(crate) fn fork_idle() -> Result<u32, String> {
    // SAFETY: the child only makes system calls.
    let id = told("fork", unsafe { libc::fork() }.into())?;
    if id == 0 {
        // In case that nobody kills it.
        // SAFETY: no pointers.
        unsafe { libc::alarm(BOUND.as_secs() as u32 * 2) };
        loop {
            // SAFETY: no pointers.
            unsafe { libc::pause() };
        }
    }
    Ok(id as u32)
}

/// A child that waits until this process, its parent, is gone, and then has a child of its own with this process's ID:
/// all of them with copies of this process's memory. It ends if it may not choose process IDs.
pub(crate) fn fork_heir() -> Result<u32, String> {
    let next = CString::new((std::process::id() - 1).to_string()).map_err(|e| e.to_string())?;
    let own = std::process::id().cast_signed();
    // SAFETY: the child only makes system calls, with memory that was made before.
    let id = told("fork", unsafe { libc::fork() }.into())?;
    if id != 0 {
        return Ok(id as u32);
    }
    let text = next.as_bytes();
    // SAFETY: no pointers but those to strings that live on.
    unsafe {
        libc::alarm(BOUND.as_secs() as u32 * 2);
        while libc::kill(own, 0) == 0 {
            libc::usleep(1000);
        }
        let file = libc::open(c"/proc/sys/kernel/ns_last_pid".as_ptr(), libc::O_WRONLY);
        for _ in 0..500 {
            if libc::pwrite(file, text.as_ptr().cast(), text.len(), 0) < 0 {
                break;
            }
            match libc::fork() {
                0 if libc::getpid() == own => {
                    libc::alarm(BOUND.as_secs() as u32 * 2);
                    loop {
                        libc::pause();
                    }
                }
                0 => libc::_exit(0),
                child if child == own => loop {
                    libc::pause();
                },
                child => {
                    libc::waitpid(child, std::ptr::null_mut(), 0);
                }
            }
        }
        libc::_exit(1)
    }
}

/// Waits for a process with this ID; false: the one that was to make it has ended.
pub fn wait_for_process(id: u32, maker: u32) -> bool {
    let exists = |id: u32| {
        // One that has ended and is not waited for has no program any more.
        std::fs::read_link(format!("/proc/{id}/exe")).is_ok()
    };
    let mut found = false;
    eventually("the process ID is used again, or it may not be", || {
        found = exists(id);
        found || !exists(maker)
    });
    found
}

/// Runs `child` in a forked process and waits for it. Its answer is 0 when all is well.
pub fn in_forked_child(child: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child only runs `child`, which starts no threads and ends in `_exit`.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork");
    if pid == 0 {
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(99);
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    let start = Instant::now();
    loop {
        // SAFETY: our own child.
        match unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } {
            0 if start.elapsed() > BOUND => {
                // SAFETY: our own child, which has not been waited for.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                panic!("the child hangs");
            }
            0 => std::thread::sleep(Duration::from_millis(1)),
            _ => break,
        }
    }
    assert!(libc::WIFEXITED(status), "the child died of signal {}", libc::WTERMSIG(status));
    libc::WEXITSTATUS(status)
}

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub struct Killed(pub u32);

impl Drop for Killed {
    fn drop(&mut self) {
        // SAFETY: no pointers; a process of this test.
        unsafe { libc::kill(self.0 as i32, libc::SIGKILL) };
    }
}

/// Starts the peer's binary with a process ID that has just become free. `Ok(None)`: others on this machine take it again
/// and again.
///
/// # Errors
/// It is not allowed here to say which process ID comes next.
pub fn start_with_id(binary: &str, id: u32) -> io::Result<Option<PeerProcess>> {
    // Others start processes, too, and one of theirs may have the ID for a while.
    let end = Instant::now() + BOUND;
    while Instant::now() < end {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (id - 1).to_string())?;
        let process = PeerProcess::start(binary);
        if process.id() == id {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

/// Says that a test was not run, for want of a right; panics when it is another failure.
#[track_caller]
pub fn skipped(what: &str, error: &io::Error) {
    let wants = [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EROFS];
    let of_rights = error.raw_os_error().is_some_and(|code| wants.contains(&code));
    assert!(of_rights, "{what}: {error}");
    not_run(&format!("{what}: {error}"));
}

/// Says that a test was not run, or a part of it. Runners do not show what a test that passes has said: where the environment names a file
/// for that (`CORELANE_TEST_SKIPPED`), it is kept there, too, for who has started them.
pub fn not_run(why: &str) {
    // A runner that has a process for each test gives that the test's name as its first argument.
    let test = match std::thread::current().name() {
        None | Some("main") => std::env::args().nth(1).unwrap_or_default(),
        Some(name) => name.to_owned(),
    };
    let line = format!("SKIPPED: {test}: {why}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("CORELANE_TEST_SKIPPED") {
        let file = std::fs::File::options().append(true).create(true).open(path);
        // One call: lines of several processes do not mix.
        file.and_then(|mut file| std::io::Write::write_all(&mut file, line.as_bytes()))
            .expect("the file that CORELANE_TEST_SKIPPED names");
    }
}
