//! The admission [`Policy`] of a limit, and the [`Release`] of its permits.

use std::time::Duration;

use tokio::time::Instant;

use super::{
    adaptive::Sampler,
    limiter::{Acquisition, Limiter},
    partition::{ClassifyCall, PartitionedPolicy},
    shared::{LimitPermit, LimitStateRef, SharedLimiter},
    sweeper::ensure_sweeper,
    tag::{EXEMPT, SHADOW},
    wait::PermitWait,
};
use crate::{
    admission::{Admit, Policy, Terms},
    outcome::{LayerKind, Outcome, Rejected, RejectedKind},
    permit::{Measures, Release, ReleaseAt, Slot, Token},
    sealed::Sealed,
    time::CallClock,
};

impl<Req> Policy<Req> for SharedLimiter {
    type StateRef = LimitStateRef;
    type Pass = Token;
    type Wait = PermitWait;

    const LAYER: LayerKind = LayerKind::ConcurrencyLimit;

    fn name(&self) -> &str {
        Limiter::name(self)
    }

    fn count_misconfigured(&self) {
        Limiter::count_misconfigured(self);
    }

    #[inline]
    fn peek(&self) -> bool {
        self.has_room()
    }

    #[inline]
    fn admit(&self, _: &Req, terms: impl Terms) -> Admit<Token, PermitWait> {
        if let Some(token) = terms.health_call().and_then(|call| self.admit_health_call(call)) {
            return Admit::Pass(token);
        }
        let deadline = terms.deadline().map(|deadline| deadline.at());
        if CallClock::is_past(deadline) {
            return decide(self, DEADLINE_PASSED, deadline);
        }
        match self.try_acquire() {
            Some(token) => Admit::Pass(token),
            None => decide(self, self.join_queue(), deadline),
        }
    }

    #[inline]
    fn attributes(&self) -> bool {
        self.adaptive().is_some()
    }

    #[inline]
    fn permit(&self, token: Token) -> LimitPermit {
        SharedLimiter::permit(self, token)
    }

    fn reject_late(&self, _: &Req) -> Option<Rejected> {
        self.reject(RejectedKind::DeadlinePassed).err()
    }
}

impl<Req, K: ClassifyCall<Req>> Policy<Req> for PartitionedPolicy<K> {
    type StateRef = LimitStateRef;
    type Pass = Token;
    type Wait = PermitWait;

    const LAYER: LayerKind = LayerKind::ConcurrencyLimit;

    fn name(&self) -> &str {
        Limiter::name(&self.limiter)
    }

    fn count_misconfigured(&self) {
        Limiter::count_misconfigured(&self.limiter);
    }

    fn peek(&self) -> bool {
        self.limiter.has_room()
    }

    fn admit(&self, request: &Req, terms: impl Terms) -> Admit<Token, PermitWait> {
        let (limiter, class) = (&self.limiter, self.classifier.classify(request));
        if class.exempt {
            return Admit::Pass(limiter.admit_exempt());
        }
        if let Some(token) = terms.health_call().and_then(|call| limiter.admit_health_call(call)) {
            return Admit::Pass(token);
        }
        let deadline = terms.deadline().map(|deadline| deadline.at());
        let acquisition =
            if CallClock::is_past(deadline) { DEADLINE_PASSED } else { limiter.acquire(class) };
        decide(limiter, acquisition, deadline)
    }

    fn attributes(&self) -> bool {
        self.limiter.adaptive().is_some()
    }

    fn permit(&self, token: Token) -> LimitPermit {
        self.limiter.permit(token)
    }

    fn reject_late(&self, request: &Req) -> Option<Rejected> {
        if self.classifier.classify(request).exempt {
            return None;
        }
        self.limiter.reject(RejectedKind::DeadlinePassed).err()
    }
}

const DEADLINE_PASSED: Result<Acquisition, RejectedKind> = Err(RejectedKind::DeadlinePassed);

/// Converts the result of an attempt to acquire a permit into the decision of the admission.
fn decide(
    limiter: &SharedLimiter,
    acquisition: Result<Acquisition, RejectedKind>,
    deadline: Option<Instant>,
) -> Admit<Token, PermitWait> {
    if !matches!(acquisition, Ok(Acquisition::Admitted(_))) {
        // If every permit is held by an unread response, only the sweeper can release one, and it ends with the runtime
        // that it was spawned on. So each call that does not acquire a permit makes sure that there is a sweeper.
        ensure_sweeper(limiter.slot());
    }
    match acquisition {
        Ok(Acquisition::Admitted(token)) => Admit::Pass(token),
        Ok(Acquisition::Queued(entry)) => {
            Admit::Queue(Box::pin(PermitWait::new(limiter.clone(), entry, deadline)))
        }
        Err(kind) => match limiter.reject(kind) {
            Ok(token) => Admit::Pass(token),
            Err(rejected) => Admit::Reject(rejected),
        },
    }
}

/// The release of a call that needs nothing but the word: of a fixed limit, in no partition.
impl Release for Slot<Limiter> {
    #[inline]
    fn release(&self, token: Token, _: Outcome) {
        match self.word().readers.free(token) {
            Some(token) if token.tag & SHADOW == 0 => Limiter::release_in(self),
            _ => {}
        }
    }

    #[inline]
    fn release_at(&self) -> ReleaseAt {
        if self.word().releases_at_head() { ReleaseAt::Head } else { ReleaseAt::Body }
    }

    #[inline]
    fn watches_reader(&self, token: Token) -> bool {
        self.word().readers.is_on() && token.tag & (EXEMPT | SHADOW) == 0
    }

    /// Starts to watch a response body, and records its reader slot in the token.
    fn watch_reader(&self, token: &mut Token) -> bool {
        let Some(tag) = self.word().readers.claim(token.tag) else { return false };
        token.tag = tag;
        ensure_sweeper(self);
        true
    }

    fn body_polled(&self, token: Token, frame: Option<usize>) -> bool {
        self.word().readers.record_poll(token, frame)
    }
}

/// The release of a call that needs the limiter: of an adaptive limit, in a partition, or exempt.
impl Sealed for Limiter {}

impl Release for Limiter {
    #[inline]
    fn release(&self, token: Token, outcome: Outcome) {
        if let Some(token) = self.slot().word().readers.free(token) {
            self.release(token);
            self.record_end(token, outcome);
        }
    }

    #[inline]
    fn record_head(&self, token: &mut Token, so_far: Outcome) {
        self.record_head(token, so_far);
    }

    #[inline]
    fn release_at(&self) -> ReleaseAt {
        self.slot().release_at()
    }

    #[inline]
    fn measures(&self) -> Measures {
        self.adaptive().map_or(Measures::Nothing, Sampler::measures)
    }

    fn count_cancelled_after(&self) -> Option<Duration> {
        self.adaptive()?.count_cancelled_after()
    }

    #[inline]
    fn watches_reader(&self, token: Token) -> bool {
        self.slot().watches_reader(token)
    }

    fn watch_reader(&self, token: &mut Token) -> bool {
        self.slot().watch_reader(token)
    }

    fn body_polled(&self, token: Token, frame: Option<usize>) -> bool {
        self.slot().body_polled(token, frame)
    }
}
