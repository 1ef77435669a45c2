//! Scattered blocks that are looked at by a kernel of the GPU that they were copied to.

use corelane_tests::{GpuKernels, WordRange};

use super::*;

/// Blocks of whole words, and what a kernel has to find of them at their places.
fn word_blocks(random: &mut Random, count: usize) -> (Vec<(usize, usize, usize)>, Vec<WordRange>) {
    let whole = |at: usize| at - at % 4;
    let list: Vec<_> = blocks(random, count)
        .into_iter()
        .map(|(here, there, len)| (whole(here), whole(there), whole(len).max(4)))
        .collect();
    let words = list
        .iter()
        .map(|&(here, there, len)| ((here / 4) as u32, (there / 4) as u32, (len / 4) as u32));
    (list.clone(), words.collect())
}

/// Ten thousand rounds, and fewer where the GPUs are threads.
fn rounds() -> u32 {
    if Cuda::get().is_some_and(Cuda::is_fake) { 20 } else { 10_000 }
}

const WORDS: u32 = (LEN / 4) as u32;

#[test]
fn a_kernel_finds_scattered_blocks_whole_round_after_round() {
    let Some(count) = gpus(1) else { return };
    let mut far = far(u32::from(count > 1), "");
    let near = side("near", local_config(), 0);
    let peer = near.connect(&far.metadata);
    let mut random = Random::new(11);
    let all: Vec<_> = [1, 40, 700]
        .map(|count| {
            let (list, words) = word_blocks(&mut random, count);
            let local: Vec<_> =
                list.iter().map(|&(here, _, len)| near.memory.segment(here, len)).collect();
            let remote: Vec<_> = list
                .iter()
                .map(|&(_, there, len)| far.region.segment(there as u64, len as u64))
                .collect();
            let plan = near.engine.prepare(Operation::Read, &peer, &local, &remote).unwrap();
            (plan.transfer(), GpuKernels::new(0, &words))
        })
        .into();
    for round in 1..=rounds() {
        far.process.ask(&format!("gpu-kernel-fill r {WORDS} {round}"));
        let (transfer, kernels) = &all[round as usize % all.len()];
        end_of(transfer).unwrap();
        assert_eq!(kernels.wrong(&near.memory, round), 0, "words in round {round}");
        // It does look: those of another round are all wrong.
        assert!(round > 3 || kernels.wrong(&near.memory, round + 1) > 0);
    }
}

#[test]
fn a_kernel_that_follows_a_notification_finds_the_blocks_whole() {
    let Some(count) = gpus(1) else { return };
    let gpu = u32::from(count > 1);
    let (near, far) = (side("near", local_config(), 0), side("far", local_config(), gpu));
    let peer = near.connect(&far.engine.metadata());
    let (list, words) = word_blocks(&mut Random::new(12), 300);
    let local: Vec<_> =
        list.iter().map(|&(_, there, len)| near.memory.segment(there, len)).collect();
    let remote: Vec<_> = list
        .iter()
        .map(|&(here, _, len)| far.region.descriptor().segment(here as u64, len as u64))
        .collect();
    let plan = near.engine.prepare(Operation::Write, &peer, &local, &remote).unwrap();
    let (write, here, there) =
        (plan.transfer(), GpuKernels::new(0, &[]), GpuKernels::new(gpu, &words));
    for round in 1..=rounds() {
        here.fill(&near.memory, WORDS, round);
        write.post_with_notification(b"written").unwrap();
        assert_eq!(collect(&far.engine, 1)[0].payload, b"written");
        assert_eq!(there.wrong(&far.memory, round), 0, "words in round {round}");
        outcome(&write).unwrap();
    }
}
