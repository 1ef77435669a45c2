//! The ways to another process are shown by a child that is forked here and does nothing but exist: its
//! memory is a copy of ours, at the same addresses.

use super::*;

/// A child process that waits to be killed.
struct Child(Pid);

impl Child {
    fn new() -> Self {
        // SAFETY: the child makes only calls that are safe after a fork.
        match unsafe { libc::fork() } {
            0 => loop {
                // SAFETY: as above.
                unsafe { libc::pause() };
            },
            pid => Self(Pid(pid)),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe {
            libc::kill(self.0.0, libc::SIGKILL);
            libc::waitpid(self.0.0, std::ptr::null_mut(), 0);
        }
    }
}

fn value(nonce: &[u8; 16]) -> (u64, [u8; 16]) {
    (nonce.as_ptr() as usize as u64, *nonce)
}

#[test]
fn a_process_is_reached_only_if_it_holds_the_nonce() {
    let nonce = Box::new([7u8; 16]);
    let child = Child::new();
    let (found, reason) = reach(Some(child.0), false, value(&nonce));
    assert!(matches!(found, Reach::Process { memory: Some(_), .. }), "{reason:?}");
    let other = (nonce.as_ptr() as usize as u64, [8; 16]);
    let (found, reason) = reach(Some(child.0), false, other);
    assert!(matches!(found, Reach::MappedOnly) && reason.is_some());
    let (found, reason) = reach(Some(child.0), false, (8, [0; 16]));
    assert!(matches!(found, Reach::MappedOnly), "nothing is mapped there");
    assert!(reason.unwrap().contains("process_vm_readv"));
    let (found, reason) = reach(None, false, value(&nonce));
    assert!(matches!(found, Reach::MappedOnly) && reason.unwrap().contains("PID namespace"));
    assert!(matches!(reach(Some(child.0), true, value(&nonce)), (Reach::SameProcess, None)));
}

/// Whoever lives in a PID namespace and sees the /proc of another finds strangers under the numbers that it knows: kernel
/// threads, which have no address space, or nobody.
#[test]
fn the_proc_of_another_namespace_tells_of_no_death() {
    const INSIDE: &str = "CORELANE_TEST_IN_PID_NAMESPACE";
    if std::env::var_os(INSIDE).is_some() {
        assert!(!cma::has_no_address_space(Pid::own()));
        return;
    }
    let unshare = |program: &str| {
        // The shell is the first process there, and the program the second.
        let script = format!("{program}; exit $?");
        let mut command = std::process::Command::new("unshare");
        command.args(["--pid", "--fork", "sh", "-c", &script]).env(INSIDE, "1");
        command.output().is_ok_and(|output| output.status.success())
    };
    if !unshare("true") {
        eprintln!("SKIPPED: no PID namespace can be made here");
        return;
    }
    let this = std::env::current_exe().unwrap();
    let test = "transport::local::path::tests::the_proc_of_another_namespace_tells_of_no_death";
    assert!(unshare(&format!("'{}' --exact {test} | grep -q '1 passed'", this.display())));
}

#[test]
fn a_process_without_an_address_space_is_told_from_one_without_its_first_thread() {
    let child = Child::new();
    assert!(!cma::has_no_address_space(child.0) && !cma::has_no_address_space(Pid::own()));
    // SAFETY: our own child. It is not waited for: it stays, without memory.
    unsafe { libc::kill(child.0.0, libc::SIGKILL) };
    let start = std::time::Instant::now();
    while !cma::has_no_address_space(child.0) {
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "it is never seen to end");
        std::thread::yield_now();
    }
    let id = child.0;
    drop(child);
    assert!(cma::has_no_address_space(id), "it does not exist");
    // Its first thread ends; the other lives on.
    let program = format!(
        "import ctypes, threading, time; \
         threading.Thread(target=time.sleep, args=(60,)).start(); ctypes.CDLL(None).syscall({}, 0)",
        libc::SYS_exit
    );
    let Ok(mut living) = std::process::Command::new("python3").args(["-c", &program]).spawn()
    else {
        eprintln!("SKIPPED: a process without its first thread: there is no python3");
        return;
    };
    let pid = Pid(living.id().cast_signed());
    let first_has_ended = || {
        let line = std::fs::read_to_string(format!("/proc/{}/stat", pid.0)).unwrap();
        line.rsplit(')').next().unwrap().trim_start().starts_with('Z')
    };
    while !first_has_ended() {
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "its first thread lives");
        std::thread::yield_now();
    }
    assert!(!cma::has_no_address_space(pid), "a thread of it lives");
    living.kill().unwrap();
    living.wait().unwrap();
}

#[test]
fn the_file_of_an_address_space_knows_when_it_is_empty() {
    let nonce = Box::new([7u8; 16]);
    let child = Child::new();
    let memory = ProcessMemory::open(child.0).unwrap();
    let (addr, expected) = value(&nonce);
    assert!(memory.holds(addr, &expected) && !memory.is_empty());
    assert!(!memory.holds(addr, &[9; 16]));
    drop(child);
    assert!(memory.is_empty() && !memory.holds(addr, &expected));
    let own = Pid(std::process::id().cast_signed());
    assert!(!ProcessMemory::open(own).unwrap().is_empty());
}

#[test]
fn lists_are_cut_and_continued_anywhere() {
    let list = [IoSegment::new(100, 10), IoSegment::new(200, 5), IoSegment::new(300, 1)];
    let shape = |list: &CallList| list.iter().map(|s| (s.addr(), s.len())).collect::<Vec<_>>();
    for (done, bytes, expected) in [
        (0, 16, vec![(100, 10), (200, 5), (300, 1)]),
        (3, 9, vec![(103, 7), (200, 2)]),
        (10, 5, vec![(200, 5)]),
        (15, 1, vec![(300, 1)]),
        (16, 0, vec![]),
    ] {
        let mut out = CallList::new();
        rest(&list, done, &mut out);
        cut(&mut out, bytes);
        assert_eq!(shape(&out), expected, "{done} {bytes}");
    }
}

#[test]
fn mapped_memory_is_translated_within_its_bounds_only() {
    use super::super::shm;
    use std::os::fd::AsFd;
    let fd = shm::create(c"test", 4096, false).unwrap();
    let map = Mapping::new(fd.as_fd(), 4096, true).unwrap();
    let start = map.addr();
    let memory = PeerMemory::new(map, 1 << 40, 4000, true).unwrap();
    let at = |addr, len| memory.translate(&IoSegment::new(addr, len)).map(|s| (s.addr(), s.len()));
    assert_eq!(at(1 << 40, 4000), Some((start, 4000)));
    assert_eq!(at((1 << 40) + 100, 5), Some((start + 100, 5)));
    for (addr, len) in [((1 << 40) - 1, 1), ((1 << 40) + 1, 4000), (1 << 40, 4001), (0, 1)] {
        assert_eq!(at(addr, len), None);
    }
    let mut lying = memory;
    lying.len = 1 << 30;
    assert!(lying.translate(&IoSegment::new((1 << 40) + 4000, 97)).is_none());
}
