//! Each way in which a lane cannot start, provoked for real in a child process, and that its message says what to do.

#![allow(clippy::unwrap_used)]

mod common;

use std::process::Command;

use common::*;
use corelane_runtime::*;

const CASE: &str = "CORELANE_TEST_CASE";

/// Runs this very test again in a child process that first does `spoil`; there it checks, here it reports.
fn in_child(case: &str, test: &str, check: impl FnOnce()) {
    if std::env::var(CASE).as_deref() == Ok(case) {
        check();
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(CASE, case)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}

fn start_error() -> LaneError {
    let seen = Default::default();
    let before = (open_fds(), threads());
    let made = Lane::start(LaneConfig::default(), move |_| Probe::new(seen));
    let error = made.map(|_| ()).expect_err("the lane started");
    wait_until("nothing left behind", || open_fds() <= before.0 && threads() <= before.1);
    error
}

fn says(error: &LaneError, words: &[&str]) {
    let text = error.to_string();
    words.iter().for_each(|word| assert!(text.contains(word), "`{text}` does not name {word}"));
}

fn set_limit(resource: libc::__rlimit_resource_t, value: u64) {
    let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
    // SAFETY: a valid structure.
    assert_eq!(unsafe { libc::setrlimit(resource, &limit) }, 0);
}

/// Makes io_uring_setup fail with `errno`, the way a container's profile does.
fn forbid_io_uring(errno: i32) {
    let op = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, libc::SYS_io_uring_setup as u32, 0, 1),
        op(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno as u32, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: a valid program that outlives the calls; a child process only.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter, 0, 0), 0);
    }
}

#[test]
fn io_uring_forbidden_by_seccomp() {
    in_child("seccomp", "io_uring_forbidden_by_seccomp", || {
        forbid_io_uring(libc::EPERM);
        let error = start_error();
        if std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
            .is_ok_and(|v| v.trim() != "0")
        {
            assert!(matches!(error, LaneError::IoUringDisabledBySysctl { .. }), "{error}");
            return;
        }
        assert!(matches!(error, LaneError::IoUringForbiddenBySeccomp { .. }), "{error}");
        says(&error, &["seccomp", "io_uring_setup", "profile"]);
    });
}

#[test]
fn io_uring_hidden_by_seccomp() {
    in_child("enosys", "io_uring_hidden_by_seccomp", || {
        forbid_io_uring(libc::ENOSYS);
        let error = start_error();
        assert!(matches!(error, LaneError::IoUringForbiddenBySeccomp { .. }), "{error}");
    });
}

#[test]
fn too_little_lockable_memory() {
    in_child("memlock", "too_little_lockable_memory", || {
        set_limit(libc::RLIMIT_MEMLOCK, 64 * 1024);
        let error = start_error();
        assert!(
            matches!(
                error,
                LaneError::MemlockTooLow { limit_bytes: 65_536, needed_bytes: 524_288 }
            ),
            "{error}"
        );
        says(&error, &["65536", "ulimit -l 512", "LimitMEMLOCK"]);
    });
}

/// Below it are so many numbers of descriptors that are free: a runner may have left high ones open, which take no room there.
fn limit_with_free_fds(free: usize) -> u64 {
    let entries = std::fs::read_dir("/proc/self/fd").expect("/proc/self/fd");
    let open: Vec<u64> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    (0..).filter(|number| !open.contains(number)).nth(free).expect("there are free numbers")
}

#[test]
fn no_descriptors_left() {
    in_child("nofile", "no_descriptors_left", || {
        set_limit(libc::RLIMIT_NOFILE, limit_with_free_fds(6));
        let error = start_error();
        assert!(matches!(error, LaneError::OutOfFileDescriptors { .. }), "{error}");
        says(&error, &["ulimit -n"]);
    });
}

#[test]
fn no_more_threads() {
    in_child("nproc", "no_more_threads", || {
        // Root is exempt from the limit, so become somebody else. In a container root may have no right to, or there is nobody else.
        // SAFETY: plain system calls in a child process.
        let is_root = unsafe { libc::geteuid() == 0 };
        // SAFETY: as above.
        if is_root && unsafe { libc::setgid(65_534) != 0 || libc::setuid(65_534) != 0 } {
            let error = std::io::Error::last_os_error();
            return eprintln!("SKIPPED: root that cannot become another user: {error}");
        }
        set_limit(libc::RLIMIT_NPROC, 1);
        let error = start_error();
        assert!(matches!(error, LaneError::SpawnThread(_)), "{error}");
        says(&error, &["ulimit -u", "pids.max"]);
    });
}

#[test]
fn a_core_outside_the_affinity_mask() {
    in_child("affinity", "a_core_outside_the_affinity_mask", || {
        placement::pin_thread(placement::current_core().unwrap()).unwrap();
        let allowed = placement::allowed_cores().unwrap();
        for core in [allowed.cores()[0] + 1, 4095, usize::MAX] {
            let seen = Default::default();
            let config = LaneConfig { core: Some(core), ..LaneConfig::default() };
            let error = Lane::start(config, move |_| Probe::new(seen)).unwrap_err();
            assert!(matches!(error, LaneError::CoreNotAllowed { .. }), "{error}");
            says(&error, &[&core.to_string(), &format!("({allowed})"), "taskset"]);
        }
    });
}

#[test]
fn a_driver_that_cannot_be_made() {
    let made = Lane::<Probe>::start(LaneConfig::default(), |_| panic!("no device"));
    let error = made.unwrap_err();
    assert!(matches!(error, LaneError::MakeDriver(_)));
    says(&error, &["no device"]);
}

#[test]
fn a_lane_is_pinned_named_and_takes_no_signals() {
    let core = placement::allowed_cores().unwrap().cores()[0];
    let name = "corelane-test".to_owned();
    let (lane, _) = start(LaneConfig { name, core: Some(core), ..LaneConfig::default() });
    let status =
        lane.spawn(|_| async { std::fs::read_to_string("/proc/thread-self/status").unwrap() });
    let status = status.wait().unwrap();
    let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap().trim();
    assert_eq!(field("Name:"), "corelane-test");
    assert_eq!(field("Cpus_allowed_list:"), core.to_string());
    let blocked = u64::from_str_radix(field("SigBlk:"), 16).unwrap();
    let usual = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGCHLD, libc::SIGALRM];
    assert!(usual.iter().all(|signal| blocked >> (signal - 1) & 1 == 1), "{blocked:x}");
    lane.stop(STOP).unwrap();
}

#[test]
fn a_program_that_is_executed_inherits_no_descriptor_of_a_lane() {
    in_child("cloexec", "a_program_that_is_executed_inherits_no_descriptor_of_a_lane", || {
        let fds = || -> Vec<String> {
            let folder = std::fs::read_dir("/proc/self/fdinfo").unwrap();
            folder.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let before = fds();
        let (lane, _) = start(LaneConfig::default());
        let mut checked = 0;
        for fd in fds().into_iter().filter(|fd| !before.contains(fd)) {
            let Ok(info) = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")) else {
                continue;
            };
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
            let flags = u32::from_str_radix(flags, 8).unwrap();
            let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
            assert!(flags & libc::O_CLOEXEC as u32 != 0, "{link:?} would be inherited");
            checked += 1;
        }
        assert!(checked >= 4, "a lane has an eventfd and rings");
        lane.stop(STOP).unwrap();
    });
}
