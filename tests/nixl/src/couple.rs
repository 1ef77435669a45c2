//! Two engines of one process, without agents.

use corelane_tests::Buffer;

use crate::{Engine, Handle, MetaDescriptor, Metadata, Operation, Status, descriptor, range};

/// Two engines; the first knows the second and its region.
#[derive(Debug)]
pub struct Couple {
    /// The first engine.
    pub a: Engine,
    /// The second, while it is there.
    pub b: Option<Engine>,
    /// Memory of the first.
    pub near: Buffer,
    /// Memory of the second, which holds pattern 1.
    pub far: Buffer,
    /// What the first has registered.
    pub here: Metadata,
    /// What it has loaded of the second.
    pub there: Metadata,
    /// What the second has registered.
    pub exported: Metadata,
}

impl Couple {
    /// Bytes of each memory.
    pub const LEN: usize = 1 << 20;

    /// Both engines with the same parameters.
    pub fn new(params: &[(&str, &str)]) -> Self {
        let (near, far) = (Buffer::new(Self::LEN), Buffer::with_pattern(1, Self::LEN));
        let (a, b) = (Engine::new("a", params), Engine::new("b", params));
        let here = a.register(range(&near, 0, Self::LEN), 0).expect("a call that cannot fail");
        let exported = b.register(range(&far, 0, Self::LEN), 0).expect("a call that cannot fail");
        assert_eq!(a.load_conn_info("b", &b.conn_info()), Status::SUCCESS);
        let there = a
            .load_remote(range(&far, 0, Self::LEN), 0, &b.public_data(exported), "b")
            .expect("a call that cannot fail");
        Self { a, b: Some(b), near, far, here, there, exported }
    }

    /// The second engine.
    pub fn b(&self) -> &Engine {
        self.b.as_ref().expect("the second engine")
    }

    /// A range of the first's memory.
    pub fn local(&self, offset: usize, len: usize) -> MetaDescriptor {
        descriptor(range(&self.near, offset, len), self.here)
    }

    /// A range of the second's memory.
    pub fn remote(&self, offset: usize, len: usize) -> MetaDescriptor {
        descriptor(range(&self.far, offset, len), self.there)
    }

    /// Prepares a transfer of everything.
    pub fn prepare(&self, operation: Operation) -> Handle {
        let (local, remote) = (self.local(0, Self::LEN), self.remote(0, Self::LEN));
        self.a.prepare(operation, &[local], &[remote], "b").expect("a call that cannot fail")
    }

    /// Posts what [`Couple::prepare`] has made.
    pub fn post(
        &self,
        operation: Operation,
        handle: Handle,
        notification: Option<&[u8]>,
    ) -> Status {
        let (local, remote) = (self.local(0, Self::LEN), self.remote(0, Self::LEN));
        self.a.post(operation, &[local], &[remote], "b", handle, notification)
    }

    /// Reads everything, once.
    #[track_caller]
    pub fn reads(&self) {
        self.near.poison(0, Self::LEN);
        let handle = self.prepare(Operation::Read);
        assert!(self.post(Operation::Read, handle, None).0 >= 0);
        assert_eq!(self.a.wait(handle), Status::SUCCESS);
        self.near.assert_pattern(1, 0, Self::LEN, 0);
        assert_eq!(self.a.release(handle), Status::SUCCESS);
    }
}
