//! TODO page

mod clock;
mod deadline;
mod latency;
mod timer;

pub(crate) use self::deadline::TIMER_MARGIN;
pub use self::deadline::{Deadline, DeadlineSource};
pub(crate) use self::latency::RecentLatency;
pub(crate) use self::timer::SharedTimer;
pub(crate) use self::{
    clock::{CallClock, Clock, Nanos, nanos, poll_timer},
    deadline::{has_passed, may_have_expired},
};
