//! Fuzz targets: for every decoder of bytes from outside, and for every state machine that they drive, a function that
//! takes any bytes and asserts what must hold. Not part of the API: only with feature `fuzzing`, for the crate in `fuzz/`,
//! and in this crate's tests, which run the inputs of `fuzz/corpus/`.

mod decoders;
mod handshake;
mod ring;
mod session;
mod stream;
#[cfg(test)]
mod tests;

pub use decoders::{descriptor, frame, hello, metadata, rdma};
pub use handshake::handshake;
pub use ring::{ring, table};
pub use session::session;
pub use stream::stream;

/// A target: the name of its corpus, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All targets of this crate.
pub const TARGETS: &[Target] = &[
    ("descriptor", descriptor),
    ("frame", frame),
    ("handshake", handshake),
    ("hello", hello),
    ("metadata", metadata),
    ("rdma", rdma),
    ("ring", ring),
    ("session", session),
    ("stream", stream),
    ("table", table),
];

/// Takes choices from an input; one that is used up gives zeros.
struct Choices<'a> {
    rest: &'a [u8],
}

impl<'a> Choices<'a> {
    fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }

    fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (head, tail) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = tail;
        head
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let head = self.bytes(N);
        array[..head.len()].copy_from_slice(head);
        array
    }

    fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Once in `n` times.
    fn rarely(&mut self, n: u8) -> bool {
        self.u8().is_multiple_of(n)
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}
