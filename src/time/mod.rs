//! The clock, the deadline and the timers that the layers share.
//!
//! [`Clock`] and [`Nanos`] are the time of a layer's state, [`CallClock`] is one reading of the clock for all layers of
//! a call, and [`SharedTimer`] is one timer for all layers that wait for the same deadline. All of them use tokio's
//! clock. [`WaitTimes`] are the waits in a queue, for metrics.

mod clock;
mod deadline;
mod latency;
mod timer;
mod wait_times;

pub(crate) use self::deadline::TIMER_MARGIN;
pub use self::deadline::{Deadline, DeadlineSource};
pub(crate) use self::latency::RecentLatency;
pub(crate) use self::timer::SharedTimer;
pub(crate) use self::wait_times::{WaitResult, WaitTimes};
pub(crate) use self::{
    clock::{CallClock, Clock, Nanos, nanos, poll_timer},
    deadline::{has_passed, may_have_expired},
};
