//! Time of day and chance.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix time in milliseconds; 0 on a clock that stands before 1970.
pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

/// Random bits from the system, for jitter, ids and seeds; not for keys.
pub fn chance() -> u32 {
    let (_, low) = uuid::Uuid::now_v7().as_u64_pair();
    // The lowest bits of a version 7 UUID are random.
    (low & u64::from(u32::MAX)) as u32
}
