//! The results of uploads.

use std::{fmt::Display, time::Duration};

/// A drain lasts for one second. A client that sends for longer, because the machine is busy, may lose the rejection.
const MAX_UPLOAD_TIME: Duration = Duration::from_millis(900);

#[derive(Debug, Default)]
pub struct Results {
    arrived: usize,
    slow: usize,
    lost: Vec<String>,
}

impl Results {
    /// Adds the status or the error of an upload that took this long.
    pub fn add(&mut self, what: &dyn Display, result: Result<u16, String>, took: Duration) {
        match result {
            Ok(503 | 504) => self.arrived += 1,
            _ if took > MAX_UPLOAD_TIME => self.slow += 1,
            other => self.lost.push(format!("{what}: {other:?} after {took:?}")),
        }
    }

    /// Adds other results.
    pub fn extend(&mut self, other: Self) {
        self.arrived += other.arrived;
        self.slow += other.slow;
        self.lost.extend(other.lost);
    }

    /// # Panics
    ///
    /// A rejection was lost, or the results are not those of `count` uploads, or most of them were slow.
    #[track_caller]
    pub fn assert_all_arrived(&self, count: usize) {
        println!("{} of {count} rejections arrived, {} uploads were slow", self.arrived, self.slow);
        assert!(self.lost.is_empty(), "{:#?}", self.lost);
        assert_eq!(self.arrived + self.slow, count);
        assert!(self.slow <= count / 2, "{self:?}");
    }
}
