use std::{error::Error, fmt, time::Duration};

use http::Response;

use super::give_up::GiveUpReason;
use crate::{
    error::{self, BoxError},
    outcome::{Outcome, Rejected},
    redact::Redacted,
};

/// The record of a call's attempts, in the extensions of its response and in its error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attempts {
    /// The number of attempts. 0 if the service failed in `poll_ready` or the deadline passed before the first attempt.
    pub made: u32,
    /// The number of attempts that the upstream may have processed: all except those that an inner layer rejected, that
    /// got no connection, or whose stream the upstream refused.
    pub sent: u32,
    /// The total of the delays between the attempts.
    pub waited: Duration,
    /// The reason for which no further attempt was made.
    pub stop: GiveUpReason,
    records: Vec<AttemptRecord>,
}

/// One attempt of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AttemptRecord {
    /// The outcome of the attempt, with its reason.
    pub outcome: Outcome,
    /// The delay between this attempt and the next. Zero after the last attempt.
    pub waited: Duration,
}

/// The maximum number of attempts of a call that are recorded one by one.
const MAX_RECORDS: usize = 32;

impl Attempts {
    pub(crate) const FIRST: Self = Self::after(1, GiveUpReason::Responded);
    /// The first attempt is in flight and has not been sent.
    pub(crate) const UNSENT: Self = Self {
        made: 1,
        sent: 0,
        waited: Duration::ZERO,
        stop: GiveUpReason::Responded,
        records: Vec::new(),
    };
    /// The first attempt ended with an error that is not retryable.
    pub(crate) const FIRST_ERROR: Self = Self::after(1, GiveUpReason::NotRetryable);
    /// `poll_ready` failed before the first attempt.
    pub(crate) const NONE: Self = Self::after(0, GiveUpReason::NotReady);

    const fn after(made: u32, stop: GiveUpReason) -> Self {
        Self { made, sent: made, waited: Duration::ZERO, stop, records: Vec::new() }
    }

    /// Returns the attempts in order, including the last, at most the first 32. Empty if there was no attempt, or if
    /// the first attempt was the only one and its result was not retryable.
    #[must_use]
    pub fn records(&self) -> &[AttemptRecord] {
        &self.records
    }

    pub(crate) fn push(&mut self, record: AttemptRecord) {
        self.waited = self.waited.saturating_add(record.waited);
        if self.records.len() < MAX_RECORDS {
            self.records.push(record);
        }
    }

    /// Returns the record of a response. A response without a record is that of a first attempt and was not retryable:
    /// the result is then one attempt with [`GiveUpReason::Responded`].
    #[must_use]
    pub fn of<B>(response: &Response<B>) -> Self {
        response.extensions().get().cloned().unwrap_or(Self::FIRST)
    }

    /// Returns the record in `error` or its sources, if there is one.
    #[must_use]
    pub fn find(error: &(dyn Error + 'static)) -> Option<Self> {
        Self::find_ref(error).cloned()
    }

    /// Returns whether the record is in `error` or its sources.
    pub(crate) fn is_in(error: &(dyn Error + 'static)) -> bool {
        Self::find_ref(error).is_some()
    }

    fn find_ref<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        error::chain(error)
            .find_map(|error| error.downcast_ref::<RetryError>())
            .map(|found| &found.attempts)
    }
}

/// The number of an attempt, in the extensions of the requests of all attempts but the first. 2 is the second attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt(pub u32);

/// The error of a call that a [`RetryLayer`](crate::retry::RetryLayer) gave up on. Its source is the error of the last
/// attempt.
///
/// The text states the [`GiveUpReason`] and the outcome of the last attempt, if it is known: `gave up after 3 attempts
/// (attempts_used_up): reset`. It states whether the upstream has received the call: `gave up after 1 attempt, nothing
/// was sent (rejected): concurrency limit is reached`.
///
/// [`attempts`](Self::attempts) returns the record. A [`Rejected`](crate::outcome::Rejected) of the last attempt is
/// among the sources. `Debug` shows the source without [secrets](crate#secrets). The source itself is the error of the
/// client, whose text may contain the URI.
pub struct RetryError {
    attempts: Attempts,
    source: BoxError,
}

impl RetryError {
    pub(crate) fn new(attempts: Attempts, source: BoxError) -> Self {
        Self { attempts, source }
    }

    /// Returns the record of the attempts.
    #[must_use]
    pub fn attempts(&self) -> &Attempts {
        &self.attempts
    }
}

impl fmt::Debug for RetryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryError")
            .field("attempts", &self.attempts)
            .field("source", &Redacted(&self.source))
            .finish()
    }
}

impl fmt::Display for RetryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Attempts { made, sent, stop, .. } = self.attempts;
        let s = if made == 1 { "" } else { "s" };
        let unsent = if sent == 0 && made > 0 { ", nothing was sent" } else { "" };
        let stop = if stop == GiveUpReason::NotRetryable { "not retryable" } else { stop.as_str() };
        write!(f, "gave up after {made} attempt{s}{unsent} ({stop})")?;
        // A short reason for readers of this error alone. The source has the details.
        let reason = || {
            Some(self.attempts.records.last()?.outcome.reason())
                .filter(|reason| reason.is_specific())
        };
        match Rejected::find(&*self.source) {
            Some(rejected) => write!(f, ": {}", rejected.kind().phrase()),
            None => reason().map_or(Ok(()), |reason| write!(f, ": {reason}")),
        }
    }
}

impl Error for RetryError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}
