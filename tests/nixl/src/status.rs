//! NIXL's status codes, by name.

use std::fmt;

/// What a call into NIXL answers (`nixl_status_t`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub i32);

impl Status {
    /// The transfer goes on.
    pub const IN_PROGRESS: Self = Self(1);
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// The request was not posted.
    pub const NOT_POSTED: Self = Self(-1);
    /// An argument is wrong.
    pub const INVALID_PARAM: Self = Self(-2);
    /// The backend failed.
    pub const BACKEND: Self = Self(-3);
    /// Something that was named is not known.
    pub const NOT_FOUND: Self = Self(-4);
    /// Bytes that cannot be understood.
    pub const MISMATCH: Self = Self(-5);
    /// Refused.
    pub const NOT_ALLOWED: Self = Self(-6);
    /// Still in flight.
    pub const REPOST_ACTIVE: Self = Self(-7);
    /// No better word.
    pub const UNKNOWN: Self = Self(-8);
    /// No such function.
    pub const NOT_SUPPORTED: Self = Self(-9);
    /// The peer is not there any more.
    pub const REMOTE_DISCONNECT: Self = Self(-10);
    /// Ended by this side.
    pub const CANCELED: Self = Self(-11);
    /// Nothing was measured.
    pub const NO_TELEMETRY: Self = Self(-12);

    /// Ok for [`Status::SUCCESS`], else the status.
    pub fn success(self) -> Result<(), Self> {
        if self == Self::SUCCESS { Ok(()) } else { Err(self) }
    }

    fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            1 => "IN_PROGRESS",
            0 => "SUCCESS",
            -1 => "NOT_POSTED",
            -2 => "INVALID_PARAM",
            -3 => "BACKEND",
            -4 => "NOT_FOUND",
            -5 => "MISMATCH",
            -6 => "NOT_ALLOWED",
            -7 => "REPOST_ACTIVE",
            -8 => "UNKNOWN",
            -9 => "NOT_SUPPORTED",
            -10 => "REMOTE_DISCONNECT",
            -11 => "CANCELED",
            -12 => "NO_TELEMETRY",
            _ => return None,
        })
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "status {}", self.0),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl std::error::Error for Status {}
