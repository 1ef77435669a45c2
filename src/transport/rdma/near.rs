//! Which rails are near host memory: those of its NUMA node, or of the nearest node that has some. Looked up when memory is registered.

use crate::sys::node_of_pages;

/// Pages that are looked at, spread over the memory.
const SAMPLES: u64 = 16;
/// Firmware that says nothing of distances: the same node, and any other.
const SAME: u32 = 10;
const OTHER: u32 = 20;

/// Where the rails of an engine are attached.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    /// Of each rail. Empty where it makes no difference: one node, or devices that were asked for by name.
    rails: Vec<Option<usize>>,
}

impl Nodes {
    pub(super) fn new(rails: Vec<Option<usize>>) -> Self {
        let mut known = rails.iter().flatten();
        let first = known.next();
        let differ = first.is_some_and(|first| known.any(|node| node != first));
        Self { rails: if differ { rails } else { Vec::new() } }
    }

    /// A bit for each rail that is near this memory; 0: all are the same to it. A system call where rails differ.
    pub(super) fn near(&self, base: u64, len: u64) -> u32 {
        if self.rails.is_empty() {
            return 0;
        }
        let step = (len / SAMPLES).max(1);
        let pages: Vec<u64> = (0..SAMPLES.min(len)).map(|index| base + index * step).collect();
        self.near_node_of(one_node(&node_of_pages(&pages)))
    }

    /// The same, of memory on this node.
    pub(super) fn near_node_of(&self, node: Option<usize>) -> u32 {
        self.near_node(node, corelane_runtime::placement::numa_distance)
    }

    fn near_node(
        &self,
        memory: Option<usize>,
        distance: impl Fn(usize, usize) -> Option<u32>,
    ) -> u32 {
        let Some(memory) = memory else { return 0 };
        let far = |node: usize| {
            distance(node, memory).unwrap_or(if node == memory { SAME } else { OTHER })
        };
        let distances: Vec<Option<u32>> = self.rails.iter().map(|node| node.map(far)).collect();
        let least = distances.iter().flatten().min().copied();
        let near = (0..).zip(&distances).filter(|(_, far)| far.is_some() && **far == least);
        near.fold(0, |mask, (rail, _)| mask | 1 << rail)
    }
}

/// The node of all pages whose node is known; `None`: they are of several, as interleaved memory is, or of none.
fn one_node(pages: &[Option<usize>]) -> Option<usize> {
    let mut known = pages.iter().flatten();
    let first = known.next()?;
    known.all(|node| node == first).then_some(*first)
}

/// What is near all of several memories; 0: all the same, or nothing is.
pub(crate) fn near_all(memories: impl Iterator<Item = u32>) -> u32 {
    memories.filter(|near| *near != 0).reduce(|all, near| all & near).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nodes 0 and 1 are one socket, 2 and 3 another.
    fn distance(from: usize, to: usize) -> Option<u32> {
        (from < 4 && to < 4).then_some(match (from == to, from / 2 == to / 2) {
            (true, _) => 10,
            (_, true) => 12,
            _ => 32,
        })
    }

    #[test]
    fn memory_prefers_the_rails_of_its_node_then_of_its_socket() {
        let nodes = Nodes::new(vec![Some(0), Some(2), Some(2), Some(3), None]);
        let near = |memory| nodes.near_node(memory, distance);
        assert_eq!(near(Some(0)), 0b00001);
        assert_eq!(near(Some(1)), 0b00001, "the other node of its socket has none");
        assert_eq!(near(Some(2)), 0b00110);
        assert_eq!(near(Some(3)), 0b01000);
        assert_eq!(near(None), 0, "not known, or on several nodes");
        assert_eq!(nodes.near_node(Some(3), |_, _| None), 0b01000, "no distances");
    }

    #[test]
    fn rails_of_one_node_or_of_none_that_is_known_are_all_the_same() {
        for rails in [vec![], vec![Some(1), Some(1)], vec![None, None], vec![Some(0), None]] {
            let nodes = Nodes::new(rails);
            assert_eq!(nodes.near_node(Some(0), distance), 0, "{nodes:?}");
            assert_eq!(nodes.near(4096, 4096), 0);
        }
    }

    #[test]
    fn memory_on_several_nodes_has_none() {
        assert_eq!(one_node(&[Some(1), None, Some(1)]), Some(1));
        assert_eq!(one_node(&[Some(1), Some(0)]), None);
        assert_eq!(one_node(&[None]), None);
    }

    #[test]
    fn several_memories_share_what_is_near_all_of_them() {
        assert_eq!(near_all([0b011, 0b110].into_iter()), 0b010);
        assert_eq!(near_all([0b001, 0b110].into_iter()), 0);
        assert_eq!(near_all([0, 0b110, 0].into_iter()), 0b110);
        assert_eq!(near_all(std::iter::empty()), 0);
    }
}
