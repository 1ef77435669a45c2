//! What lanes need of GPUs, made by the threads that register memory and prepare plans: the driver may take its time with that, and
//! wait for the GPU, while a lane has other peers to look after.

use std::sync::PoisonError;

use super::lane::LaneDriver;
use super::{EngineShared, Message};
use crate::config::TransportKind;
use crate::gpu::{Bounce, Device, LanePart, Slab};

/// One lane's.
pub(crate) struct Equipment {
    device: &'static Device,
    part: Option<LanePart>,
    /// For answers, for WRITEs, and for what is received.
    slabs: Vec<Slab>,
}

const BOUNCES: usize = 3;

/// What a lane was given, or is about to be: the first blocks of pinned memory, or its part of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Given {
    Blocks { lane: usize },
    Part { lane: usize, gpu: u32 },
}

impl EngineShared {
    /// Gives all lanes what they need on a GPU, unless they have it.
    pub(super) fn equip_lanes(&self, device: &'static Device) {
        for lane in 0..self.lanes().len() {
            self.equip_lane(lane, device);
        }
    }

    /// The same, for one. What cannot be had, the lane tries to get by itself when it needs it.
    pub(super) fn equip_lane(&self, lane: usize, device: &'static Device) {
        let part = Given::Part { lane, gpu: device.ordinal() };
        let part = self.claim(part).then(|| {
            Device::lane_part(device).inspect_err(|error| {
                tracing::warn!(%error, lane, "no streams on the GPU");
                self.disclaim(part);
            })
        });
        let part = part.and_then(Result::ok);
        let framed = self.identity.transports & TransportKind::Tcp.bit() != 0;
        let mut slabs = Vec::new();
        if framed && self.claim(Given::Blocks { lane }) {
            let made = (0..BOUNCES).map(|_| Bounce::slab(device)).collect();
            let made: Result<Vec<Slab>, _> = made;
            match made {
                Ok(made) => slabs = made,
                Err(error) => {
                    // Transfers over sockets say so, too.
                    tracing::warn!(%error, lane, "no pinned host memory");
                    self.disclaim(Given::Blocks { lane });
                }
            }
        }
        if part.is_none() && slabs.is_empty() {
            return;
        }
        let equipment = Box::new(Equipment { device, part, slabs });
        if let Ok(lane) = self.lane(lane) {
            // One that is gone needs none.
            let _ = lane.submit(Message::Equip(equipment));
        }
    }

    /// Whether the caller is the one who makes it.
    fn claim(&self, what: Given) -> bool {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = !given.contains(&what);
        if is_new {
            given.push(what);
        }
        is_new
    }

    fn disclaim(&self, what: Given) {
        let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
        given.retain(|one| *one != what);
    }
}

impl LaneDriver {
    pub(super) fn equip(&mut self, equipment: Equipment) {
        let Equipment { device, part, slabs } = equipment;
        let spare = part.and_then(|part| self.gpu.lane.take_part(part));
        if let Some(spare) = spare {
            // A transfer was faster, and the lane has made its own. Giving this back may wait for the GPU.
            let name = "corelane-gpu".to_owned();
            let _ = std::thread::Builder::new().name(name).spawn(move || drop(spare));
        }
        let bounces = self.gpu.staging.bounces_mut().iter_mut();
        for (bounce, slab) in bounces.chain([&mut self.scratch.arrivals.bounce]).zip(slabs) {
            bounce.know(device);
            bounce.add(slab);
        }
    }
}
