//! Checks of the settings of a limit.

use std::{ops::RangeInclusive, time::Duration};

use super::queue::{MAX_QUEUE_LENGTH, QueueOrder};
use crate::error::ConfigError;

pub(super) fn checked_limit(limit: usize) -> Result<u32, ConfigError> {
    match u32::try_from(limit) {
        Ok(limit) if limit > 0 => Ok(limit),
        _ => Err(ConfigError::new("limit", limit, "use 1 to 4294967295 calls")),
    }
}

pub(super) fn checked_bounds(
    bounds: RangeInclusive<usize>,
) -> Result<RangeInclusive<u32>, ConfigError> {
    let (min, max) = (checked_limit(*bounds.start())?, checked_limit(*bounds.end())?);
    if min > max {
        return Err(ConfigError::new("adaptive.bounds", bounds, "put the lower one first"));
    }
    Ok(min..=max)
}

pub(super) fn checked_queue(length: usize, max_wait: Duration) -> Result<u32, ConfigError> {
    match u32::try_from(length) {
        Ok(0..=MAX_QUEUE_LENGTH) if length > 0 && max_wait < Duration::from_millis(1) => {
            let remedy = "use 1ms or more, or a length of 0";
            Err(ConfigError::new("queue.max_wait", max_wait, remedy))
        }
        Ok(length @ 0..=MAX_QUEUE_LENGTH) => Ok(length),
        _ => Err(ConfigError::new("queue.length", length, "use at most 2147483647")),
    }
}

pub(super) fn checked_order(order: QueueOrder) -> Result<QueueOrder, ConfigError> {
    match order {
        QueueOrder::Adaptive(max) => {
            ConfigError::above_zero("queue_order", max).map(QueueOrder::Adaptive)
        }
        order => Ok(order),
    }
}

pub(super) fn checked_max_unread(time: Option<Duration>) -> Result<Option<Duration>, ConfigError> {
    time.map(|time| ConfigError::above_zero("max_unread", time)).transpose()
}

/// Checks the time of `count_cancelled_after`. A fixed limit uses no outcomes, so it has no use for a time.
pub(super) fn checked_cancelled_after(
    time: Option<Duration>,
    is_adaptive: bool,
) -> Result<Option<Duration>, ConfigError> {
    match time {
        Some(time) if !is_adaptive => {
            let remedy = "leave it out, or use an adaptive limit";
            Err(ConfigError::new("count_cancelled_after", time, remedy))
        }
        Some(time) => ConfigError::above_zero("count_cancelled_after", time).map(Some),
        None => Ok(None),
    }
}
