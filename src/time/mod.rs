//! TODO page

mod clock;
mod deadline;
mod latency;
mod timer;

pub(crate) use self::deadline::TIMER_MARGIN;
pub use self::deadline::{Deadline, DeadlineSource};
pub(crate) use self::latency::Recent;
pub(crate) use self::timer::Alarm;
pub(crate) use self::{
    clock::{Clock, Moment, Nanos, nanos, poll_timer},
    deadline::{has_passed, may_have_expired},
};
