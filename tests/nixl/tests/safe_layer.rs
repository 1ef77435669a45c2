//! The backend through the safe layer of `nixl-sys`, as an application in Rust uses it.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use std::time::Instant;

use corelane_nixl_tests::{backend, require_nixl};
use corelane_tests::{BOUND, Buffer};
use nixl_sys::{
    Agent, AgentConfig, MemType, MemoryRegion, NixlDescriptor, NixlError, NotificationMap, OptArgs,
    Params, XferDescList, XferOp, XferRequest, XferStatus,
};

/// A buffer, described as the crate wants it.
#[derive(Debug)]
struct Memory(Buffer);

impl MemoryRegion for Memory {
    unsafe fn as_ptr(&self) -> *const u8 {
        self.0.address(0) as *const u8
    }

    fn size(&self) -> usize {
        self.0.len()
    }
}

impl NixlDescriptor for Memory {
    fn mem_type(&self) -> MemType {
        MemType::Dram
    }

    fn device_id(&self) -> u64 {
        0
    }
}

fn none() -> Params {
    Params::from::<[(&str, &str); 0], _, _>([]).unwrap()
}

fn agent(name: &str) -> Agent {
    require_nixl();
    let config = AgentConfig { capture_telemetry: true, ..AgentConfig::default() };
    let agent = Agent::new_configured(name, &config).unwrap();
    agent.create_backend(&backend(), &none()).unwrap();
    agent
}

fn list(memory: &Memory) -> XferDescList<'_> {
    let mut list = XferDescList::new(MemType::Dram).unwrap();
    list.add_storage_desc(memory).unwrap();
    list
}

fn wait(agent: &Agent, request: &XferRequest) -> Result<(), NixlError> {
    let deadline = Instant::now() + BOUND;
    while agent.get_xfer_status(request)? == XferStatus::InProgress {
        assert!(Instant::now() < deadline, "a transfer without end");
        std::thread::yield_now();
    }
    Ok(())
}

fn notifications(agent: &Agent, from: &str) -> Vec<Vec<u8>> {
    let deadline = Instant::now() + BOUND;
    let mut map = NotificationMap::new().unwrap();
    while map.is_empty().unwrap() {
        assert!(Instant::now() < deadline, "no notification");
        agent.get_notifications(&mut map, None).unwrap();
        std::thread::yield_now();
    }
    let list = map.get_notifications(from).unwrap();
    list.map(|payload| payload.unwrap().to_vec()).collect()
}

#[test]
fn a_write_and_a_read_with_notifications() {
    let (a, b) = (agent("a"), agent("b"));
    let (near, far) = (Memory(Buffer::with_pattern(7, 64 << 10)), Memory(Buffer::new(64 << 10)));
    let _near = a.register_memory(&near, None).unwrap();
    let _far = b.register_memory(&far, None).unwrap();
    assert_eq!(a.load_remote_md(&b.get_local_md().unwrap()).unwrap(), "b");
    let mut args = OptArgs::new().unwrap();
    args.set_notification_message(b"written").unwrap();
    args.set_has_notification(true).unwrap();
    let request =
        a.create_xfer_req(XferOp::Write, &list(&near), &list(&far), "b", Some(&args)).unwrap();
    a.post_xfer_req(&request, Some(&args)).unwrap();
    wait(&a, &request).unwrap();
    assert_eq!(notifications(&b, "a"), [b"written"]);
    far.0.assert_pattern(7, 0, 64 << 10, 0);
    assert_eq!(request.get_telemetry().unwrap().total_bytes, 64 << 10);
    let (duration, _, _) = a.estimate_xfer_cost(&request, None).unwrap();
    assert!(duration >= 0);
    a.send_notification("b", b"free", None).unwrap();
    assert_eq!(notifications(&b, "a"), [b"free"]);
}

#[test]
fn prepared_lists_and_indices() {
    let (a, b) = (agent("a"), agent("b"));
    let block = 4096;
    let (near, far) =
        (Memory(Buffer::new(block * 64)), Memory(Buffer::with_pattern(5, block * 64)));
    let _near = a.register_memory(&near, None).unwrap();
    let _far = b.register_memory(&far, None).unwrap();
    a.load_remote_md(&b.get_local_md().unwrap()).unwrap();
    let blocks = |memory: &Memory| {
        let mut list = XferDescList::new(MemType::Dram).unwrap();
        for i in 0..64 {
            list.add_desc(memory.0.address(i * block) as usize, block, 0);
        }
        list
    };
    let local = a.prepare_xfer_dlist("", &blocks(&near), None).unwrap();
    let remote = a.prepare_xfer_dlist("b", &blocks(&far), None).unwrap();
    let (mine, theirs): (Vec<i32>, Vec<i32>) = ((0..64).step_by(2).collect(), (32..64).collect());
    let request = a.make_xfer_req(XferOp::Read, &local, &mine, &remote, &theirs, None).unwrap();
    a.post_xfer_req(&request, None).unwrap();
    wait(&a, &request).unwrap();
    for i in 0..64 {
        if i % 2 == 0 {
            near.0.assert_pattern(5, i * block, block, ((32 + i / 2) * block) as u64);
        } else {
            near.0.assert_poison(i * block, block);
        }
    }
}

#[test]
fn a_second_backend_of_the_same_kind_and_bad_parameters_are_errors() {
    let a = agent("a");
    a.create_backend(&backend(), &none()).unwrap_err();
    let b = Agent::new("b").unwrap();
    let params = Params::from([("no_such_option", "1")]).unwrap();
    b.create_backend(&backend(), &params).unwrap_err();
    b.create_backend(&backend(), &none()).unwrap();
}
