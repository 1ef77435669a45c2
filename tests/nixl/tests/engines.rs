//! Many engines on few cores: eight processes on what there is, and everything on one core.

#![allow(clippy::unwrap_used)] // Helpers of tests stop at a surprise as tests do.

use corelane_nixl_tests::{peer_process, shared_core};
use corelane_tests::PeerProcess;

const LEN: usize = 1 << 20;

/// Processes that all know each other, with a region each that holds the pattern of its number.
fn crowd(count: usize, pinned: Option<usize>, params: &str) -> (Vec<PeerProcess>, Vec<u64>) {
    let mut processes: Vec<PeerProcess> = (0..count).map(|_| peer_process!()).collect();
    let mut addresses = Vec::new();
    for (number, process) in processes.iter_mut().enumerate() {
        if let Some(core) = pinned {
            process.ask(&format!("pin {core}"));
        }
        process.ask(&format!("agent e{number} {params}"));
        addresses.push(process.number(&format!("region r {LEN}")));
        process.ask(&format!("region own {LEN}"));
        process.ask(&format!("fill r {number} 0 {LEN} 0"));
    }
    let metadata: Vec<String> = processes.iter_mut().map(|p| p.ask("metadata")).collect();
    for (number, process) in processes.iter_mut().enumerate() {
        for (other, text) in metadata.iter().enumerate() {
            if other != number {
                assert_eq!(process.ask(&format!("load {text}")), format!("e{other}"));
            }
        }
    }
    (processes, addresses)
}

fn others(count: usize, number: usize) -> impl Iterator<Item = usize> {
    (0..count).filter(move |&other| other != number)
}

/// Everybody sends numbers to everybody, reads from everybody and writes to the next, all at the same time.
fn all_with_all(count: usize, pinned: Option<usize>, params: &str, messages: usize) {
    let (mut processes, addresses) = crowd(count, pinned, params);
    for (number, process) in processes.iter_mut().enumerate() {
        let peers: Vec<String> = others(count, number).map(|other| format!("e{other}")).collect();
        process.send(&format!("exchange {messages} {}", peers.join(" ")));
    }
    for process in &mut processes {
        process.answer().unwrap();
    }
    for turn in 1..count {
        for (number, process) in processes.iter_mut().enumerate() {
            let other = (number + turn) % count;
            process.send(&format!("read e{other} own 0 {} {LEN} {number:02x}", addresses[other]));
        }
        for process in &mut processes {
            process.answer().unwrap();
        }
        for (number, process) in processes.iter_mut().enumerate() {
            let other = (number + turn) % count;
            process.ask(&format!("check own {other} 0 {LEN} 0"));
            // One reader in each turn: the one that many places before.
            let reader = (number + count - turn) % count;
            assert_eq!(process.ask("take 1"), format!("e{reader}:{reader:02x}"));
        }
    }
    for process in &mut processes {
        process.ask("quiet");
        process.ask("destroy");
    }
}

#[test]
fn eight_engines_in_eight_processes() {
    all_with_all(8, None, "", 300);
}

#[test]
fn eight_engines_in_eight_processes_without_progress_threads() {
    all_with_all(8, None, "progress=off", 100);
}

#[test]
fn eight_engines_in_eight_processes_on_one_core() {
    all_with_all(8, Some(shared_core()), "", 100);
}

#[test]
fn an_engine_that_spins_for_ever_shares_a_core_with_others() {
    all_with_all(3, Some(shared_core()), "spin_us=inf lanes=unpinned", 50);
}

#[test]
fn many_processes_come_and_go_around_one() {
    let (mut stays, address) = {
        let mut process = peer_process!();
        process.ask("agent stays");
        let address = process.number(&format!("region r {LEN}"));
        process.ask(&format!("fill r 9 0 {LEN} 0"));
        (process, address)
    };
    let metadata = stays.ask("metadata");
    for number in 0..12u8 {
        let mut process = peer_process!();
        process.ask("agent guest");
        process.ask(&format!("region own {LEN}"));
        process.ask(&format!("load {metadata}"));
        process.ask(&format!("read stays own 0 {address} {LEN} {number:02x}"));
        process.ask(&format!("check own 9 0 {LEN} 0"));
        assert_eq!(stays.ask("take 1"), format!("guest:{number:02x}"));
        // Half of them say goodbye, half of them are killed.
        if number % 2 == 0 {
            process.ask("destroy");
        }
    }
    stays.ask("quiet");
}
