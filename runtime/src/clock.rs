//! Time of day and chance.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix time in milliseconds; 0 on a clock that stands before 1970.
pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

/// 2025-01-01: no clock that is right shows an earlier time.
pub const EARLIEST_MS: u64 = 1_735_689_600_000;

/// Milliseconds from one reading of the clock to a later one. A board without a clock of its own begins in 1970: what passed
/// between a reading before it was set and one after is not known, and counts as nothing, as it does on a clock that was put
/// back.
pub fn elapsed_ms(from: u64, to: u64) -> u64 {
    if (from < EARLIEST_MS) == (to < EARLIEST_MS) {
        to.saturating_sub(from)
    } else {
        0
    }
}

/// Random bits from the system, for jitter, ids and seeds; not for keys.
pub fn chance() -> u32 {
    let (_, low) = uuid::Uuid::now_v7().as_u64_pair();
    // The lowest bits of a version 7 UUID are random.
    (low & u64::from(u32::MAX)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_lets_nothing_expire() {
        let now = EARLIEST_MS + 5000;
        assert_eq!(elapsed_ms(now - 3000, now), 3000);
        assert_eq!(elapsed_ms(now, now - 3000), 0);
        assert_eq!(elapsed_ms(60_000, now), 0, "the clock was set in between");
        assert_eq!(elapsed_ms(60_000, 90_000), 30_000, "it was not set yet");
    }
}
