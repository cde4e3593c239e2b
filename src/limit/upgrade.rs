//! Permits that outlive their call, for upgraded connections.

use std::{fmt, mem, sync::Arc, time::Duration};

use super::shared::LimitPermit;
use crate::sync::{Mutex, MutexGuard};
use crate::{
    classify::Protocol,
    outcome::{CallerDeadline, HealthCall, Outcome, SentMark, UpstreamClock, WaitsFor},
    permit::{Measures, Permit, Release, ReleaseAt, StateRef, Token},
    sealed::Sealed,
    time::Deadline,
};
use http::Request;

/// The permit of a call, in the extensions of its request. See
/// [`upgrades`](super::layer::ConcurrencyLimitLayer::upgrades).
///
/// Clones refer to the same permit; only one [`OwnedPermit`] exists at a time. If no handler [takes](Self::take) the
/// permit, the call releases it at its end, as without this type.
#[derive(Clone)]
pub struct CallPermit(Arc<UpgradeSlot>);

impl CallPermit {
    /// Takes the permit. It is released when the response body of the call has ended and the returned [`OwnedPermit`]
    /// has been dropped, whichever is later.
    ///
    /// Returns `None` while another [`OwnedPermit`] of this call exists, and after the call has ended. For an upgrade,
    /// take the permit before the response is returned. If several limits wrap the handler, this takes the permits
    /// of all of them.
    #[must_use = "the permit is released when this is dropped"]
    pub fn take(&self) -> Option<OwnedPermit> {
        let mut state = self.0.lock();
        let holder = match state.holder {
            Holder::Call => Holder::Both,
            _ => return None,
        };
        state.holder = holder;
        drop(state);
        let outer = self.0.outer.as_ref().and_then(Self::take).map(Box::new);
        Some(OwnedPermit { source: PermitSource::Call(self.0.clone()), _outer: outer })
    }
}

impl fmt::Debug for CallPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holder = self.0.holder();
        f.debug_tuple("CallPermit").field(&holder).finish()
    }
}

/// A permit that is held until this value is dropped.
///
/// The time for which it is held is not a latency, so an adaptive limit does not use it as a sample.
#[must_use = "the permit is released when this is dropped"]
pub struct OwnedPermit {
    source: PermitSource,
    _outer: Option<Box<OwnedPermit>>,
}

enum PermitSource {
    Call(Arc<UpgradeSlot>),
    /// No call: the permit was acquired through a handle.
    Handle(LimitPermit),
}

impl OwnedPermit {
    pub(super) fn acquired(permit: LimitPermit) -> Self {
        Self { source: PermitSource::Handle(permit), _outer: None }
    }
}

impl Drop for OwnedPermit {
    fn drop(&mut self) {
        match &mut self.source {
            // The time for which the handler holds the permit is not attributed to the upstream.
            PermitSource::Call(slot) => {
                slot.release_part(Holder::Call, Outcome::cancelled(), UpstreamClock::OFF)
            }
            PermitSource::Handle(permit) => permit.release_mut(Outcome::cancelled()),
        }
    }
}

impl fmt::Debug for OwnedPermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.source {
            PermitSource::Call(_) => "OwnedPermit(of a call)",
            PermitSource::Handle(_) => "OwnedPermit",
        })
    }
}

// ===== The permit shared by a call and its handler =====

/// The owner of a permit that a call and its handler share. It is the state behind a [`CallPermit`]: when
/// the measuring permit is released, the call gives up its part.
///
/// The lock is never held while the permit is released or its state is called with user code behind it: an algorithm, a
/// waker or a subscriber may use this limit, and so this slot, again.
pub(super) struct UpgradeSlot {
    state: Mutex<UpgradeState>,
    /// The permit of an outer limit, which had put its own `CallPermit` into the extensions.
    outer: Option<CallPermit>,
}

struct UpgradeState {
    permit: Permit,
    holder: Holder,
}

/// The holders of the permit. The last of them releases it.
///
/// `Call` becomes `Both` when the handler takes the permit, and `Both` becomes `Call` or `Handler` when one of the two
/// gives up its part. `Released` is final.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Call,
    Both,
    Handler,
    Released,
}

impl UpgradeSlot {
    fn lock(&self) -> MutexGuard<'_, UpgradeState> {
        self.state.lock()
    }

    fn holder(&self) -> Holder {
        self.lock().holder
    }

    /// Returns the token of the lent permit, with the clock of the measuring permit.
    fn inner_token(lent: &Permit, token: Token) -> Token {
        Token { clock: token.clock, ..lent.token() }
    }

    /// Gives up the part of the call or of the handler. If both held the permit, `rest` is the remaining holder.
    /// Otherwise the permit is released, with this outcome and clock.
    fn release_part(&self, rest: Holder, outcome: Outcome, clock: UpstreamClock) {
        let mut state = self.lock();
        if state.holder == Holder::Both {
            state.holder = rest;
            return;
        }
        state.holder = Holder::Released;
        let mut permit = state.permit.take();
        // The release wakes queued callers, which must happen without the lock.
        drop(state);
        permit.replace_clock(clock);
        permit.release(outcome);
    }
}

impl Sealed for UpgradeSlot {}

impl Release for UpgradeSlot {
    fn release(&self, token: Token, outcome: Outcome) {
        self.release_part(Holder::Handler, outcome, token.clock);
    }

    fn record_head(&self, token: &mut Token, so_far: Outcome) {
        // `Permit::head` runs user code: algorithms, wakers and subscribers. So the permit is taken out of the slot
        // first, and `LentPermit` puts it back. Before the end of the call only the call itself can release the permit,
        // and the call is in this function, so no other code needs the permit meanwhile.
        let permit = self.lock().permit.take();
        let mut lent = LentPermit { slot: self, permit };
        lent.permit.replace_clock(token.clock);
        // The measuring permit has already attributed the outcome, if it is certain.
        lent.permit.record_head(so_far, false);
        token.clock = lent.permit.token().clock;
    }

    fn release_at(&self) -> ReleaseAt {
        self.lock().permit.release_at()
    }

    fn measures(&self) -> Measures {
        self.lock().permit.state().map_or(Measures::Nothing, |state| state.measures())
    }

    fn count_cancelled_after(&self) -> Option<Duration> {
        self.lock().permit.state()?.count_cancelled_after()
    }

    fn follows_reader(&self, token: Token) -> bool {
        let permit = &self.lock().permit;
        permit.state().is_some_and(|state| state.follows_reader(Self::inner_token(permit, token)))
    }

    fn waits_for(&self, token: Token, what: WaitsFor) {
        let permit = &self.lock().permit;
        if let Some(state) = permit.state() {
            state.waits_for(Self::inner_token(permit, token), what);
        }
    }
}

/// The permit of a slot, taken out of its lock. Its drop puts the permit back into the slot, also during a panic.
struct LentPermit<'a> {
    slot: &'a UpgradeSlot,
    permit: Permit,
}

impl Drop for LentPermit<'_> {
    fn drop(&mut self) {
        let permit = self.permit.take();
        let hollow = mem::replace(&mut self.slot.lock().permit, permit);
        drop(hollow);
    }
}

impl fmt::Debug for UpgradeSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holder = self.holder();
        f.debug_struct("UpgradeSlot").field("holder", &holder).finish_non_exhaustive()
    }
}

// ===== The protocol =====

/// A protocol that lends the permit of each call to its handler, made by
/// [`upgrades`](super::layer::ConcurrencyLimitLayer::upgrades). `M` classifies the calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct Upgrades<M>(pub(super) M);

/// The state of a call that may be upgraded.
#[derive(Debug)]
pub struct UpgradableCall<C> {
    call: C,
    measuring_permit: MeasuringPermit,
}

/// The permit that measures the call while the handler may hold the lent permit. At its end it gives up the call's part
/// of the lent permit.
#[derive(Debug)]
struct MeasuringPermit {
    permit: Permit,
    mark: Option<SentMark>,
}

impl MeasuringPermit {
    fn set_clock(&mut self) {
        if let Some(mark) = self.mark.take() {
            self.permit.set_clock(&mark);
        }
    }
}

impl Drop for MeasuringPermit {
    fn drop(&mut self) {
        self.set_clock();
    }
}

impl<M> Sealed for Upgrades<M> {}

impl<M, ReqB, Res, E> Protocol<Request<ReqB>, Res, E> for Upgrades<M>
where
    M: Protocol<Request<ReqB>, Res, E>,
{
    type Response = M::Response;
    type Call = UpgradableCall<M::Call>;

    fn deadline(&self, request: &Request<ReqB>) -> Option<Deadline> {
        self.0.deadline(request)
    }

    fn sent_mark(&self, request: &Request<ReqB>) -> Option<SentMark> {
        self.0.sent_mark(request)
    }

    fn health_call(&self, request: &Request<ReqB>) -> Option<HealthCall> {
        self.0.health_call(request)
    }

    fn begin<G: StateRef>(
        &self,
        request: &mut Request<ReqB>,
        permit: impl FnOnce() -> Permit<G>,
    ) -> UpgradableCall<M::Call> {
        let deadline = CallerDeadline::of(self.deadline(request));
        // The slot takes the permit of the admission, so the inner protocol gets a spent one.
        let call = self.0.begin(request, Permit::<G>::spent);
        let mark = self.sent_mark(request);
        let permit = permit().observing(deadline, mark.is_some()).erase();
        let slot = Arc::new(UpgradeSlot {
            state: Mutex::new(UpgradeState { permit, holder: Holder::Call }),
            outer: request.extensions_mut().remove(),
        });
        let permit =
            Permit::of(&slot, Token::default()).with_record_of(&slot.lock().permit).erase();
        request.extensions_mut().insert(CallPermit(slot));
        UpgradableCall { call, measuring_permit: MeasuringPermit { permit, mark } }
    }

    fn measuring_permit(upgradable: &mut UpgradableCall<M::Call>) -> Option<&mut Permit> {
        Some(&mut upgradable.measuring_permit.permit)
    }

    fn wrap(response: Res) -> M::Response {
        M::wrap(response)
    }

    fn classify<G: StateRef>(
        mut upgradable: UpgradableCall<M::Call>,
        result: Result<&mut M::Response, &E>,
        _: &mut Permit<G>,
    ) {
        upgradable.measuring_permit.set_clock();
        M::classify(upgradable.call, result, &mut upgradable.measuring_permit.permit);
    }
}
