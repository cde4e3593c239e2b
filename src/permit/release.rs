//! The interface between a permit and the state that issued it.

use std::time::Duration;

use crate::{
    outcome::{Outcome, UpstreamClock, WaitsFor},
    sealed::Sealed,
};

/// The record of its admission that a permit carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Token {
    /// The generation of the state that issued it, with the flags that this state needs at the release.
    pub(crate) tag: u64,
    /// How long the upstream has had the request, as far as the state [measures](Release::measures) it.
    pub(crate) clock: UpstreamClock,
}

impl Token {
    /// Returns the token of a call that is not measured, or not yet.
    pub(crate) const fn unmeasured(tag: u64) -> Self {
        Self { tag, clock: UpstreamClock::OFF }
    }
}

/// The part of a call that a state measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measures {
    /// No call is measured.
    Nothing,
    /// The time to the response head. A state that needs the exact time starts the clock in the token that it
    /// issues. For the others the permit starts it at the first wait for the upstream, so that a call that never waits
    /// reads no clock.
    Head,
    /// The time to the end of the response body, without the time for which the response waits for its reader.
    Body,
}

/// The time at which a permit is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReleaseAt {
    /// At the response head, whatever its outcome is.
    Head,
    /// As soon as the outcome is certain: at a response head that is not a success, otherwise at the end of the body.
    Verdict,
    /// At the end of the body.
    Body,
}

/// The state that issues permits and receives the outcomes of their calls.
///
/// The trait is object-safe, so that the type of a response body does not depend on the layer. It is sealed: it cannot
/// be implemented outside of this crate.
pub trait Release: Sealed + Send + Sync + 'static {
    /// Releases the permit of this token and records the outcome of its call. Called exactly once for each token.
    fn release(&self, token: Token, outcome: Outcome);

    /// Records the response head. `so_far` is the outcome if the response body does not change it. The state may change
    /// the token, which [`release`](Self::release) receives.
    fn record_head(&self, token: &mut Token, so_far: Outcome) {
        let _ = (token, so_far);
    }

    /// Returns the time at which permits of this state are released.
    fn release_at(&self) -> ReleaseAt;

    /// Returns the part of a call that this state measures.
    fn measures(&self) -> Measures {
        Measures::Nothing
    }

    /// Returns the time after which a call that its caller ended counts as a failure. `None`: never.
    fn count_cancelled_after(&self) -> Option<Duration> {
        None
    }

    /// Returns whether [`waits_for`](Self::waits_for) is also called when the response starts or stops waiting for its
    /// reader. The permit calls this at the response head.
    fn follows_reader(&self, token: Token) -> bool {
        let _ = token;
        false
    }

    /// Returns whether a response body that has not ended at the head is [watched](Self::watch_reader). The permit
    /// calls this at the response head.
    fn watches_reader(&self, token: Token) -> bool {
        let _ = token;
        false
    }

    /// Starts to watch whether the response body is read. Returns whether it is watched; then the permit reports each
    /// poll.
    fn watch_reader(&self, token: &mut Token) -> bool {
        let _ = token;
        false
    }

    /// Records a poll of a watched response body, with the length of the frame, or `None` if the body was pending.
    /// Returns whether the state has released the permit, because the response was not read.
    fn body_polled(&self, token: Token, frame: Option<usize>) -> bool {
        let _ = (token, frame);
        false
    }

    /// Records what the call of this token waits for, each time it changes.
    fn waits_for(&self, token: Token, what: WaitsFor) {
        let _ = (token, what);
    }
}
