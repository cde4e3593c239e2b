//! Places that outlive their call: for upgraded connections.

use std::{
    fmt, mem,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::core::Limiter;
use crate::call::{
    Anchor, CallerDeadline, Deadline, Finish, Giver, Hold, Judge, Measures, Outcome, Permit,
    SentMark, Shared, Token, UpstreamClock, WaitsFor, grpc::HealthCall,
};
use http::Request;

/// The place that a call holds, in its request's extensions: see
/// [`upgrades`](crate::ConcurrencyLimitLayer::upgrades).
///
/// Clones are of the same place, which one at a time can [take](Self::take). Who does not take it leaves it
/// with the response, as without.
#[derive(Clone)]
pub struct Held(Shared<Slot>);

impl Held {
    /// Takes the place along: it becomes free when both the call is over, to the end of its body, and what
    /// this gives is dropped.
    ///
    /// None while somebody else has it, or if the call is over already: for an upgrade, take it before you answer.
    /// Of several limits around the handler, the places of all of them.
    #[must_use = "a place that is dropped at once is held by nobody"]
    pub fn take(&self) -> Option<HeldPlace> {
        let mut state = self.0.lock();
        let holder = match state.holder {
            Holder::Call => Holder::Both,
            _ => return None,
        };
        state.holder = holder;
        drop(state);
        let outer = self.0.outer.as_ref().and_then(Self::take).map(Box::new);
        Some(HeldPlace { of: Of::Call(self.0.clone()), _outer: outer })
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holder = self.0.holder();
        f.debug_tuple("Held").field(&holder).finish()
    }
}

/// A place that somebody holds until this is dropped.
///
/// It says nothing to an adaptive limit: how long a socket lives is no latency.
#[must_use = "a place that is dropped at once is held by nobody"]
pub struct HeldPlace {
    of: Of,
    _outer: Option<Box<HeldPlace>>,
}

enum Of {
    Call(Shared<Slot>),
    Nobody(Permit<Anchor<Limiter>>),
}

impl HeldPlace {
    pub(super) fn own(permit: Permit<Anchor<Limiter>>) -> Self {
        Self { of: Of::Nobody(permit), _outer: None }
    }
}

impl Drop for HeldPlace {
    fn drop(&mut self) {
        match &mut self.of {
            // The time for which the handler holds the permit is not attributed to the upstream.
            Of::Call(slot) => slot.leave(Holder::Call, Outcome::cancelled(), UpstreamClock::OFF),
            Of::Nobody(permit) => permit.end(Outcome::cancelled()),
        }
    }
}

impl fmt::Debug for HeldPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.of {
            Of::Call(_) => "HeldPlace(of a call)",
            Of::Nobody(_) => "HeldPlace",
        })
    }
}

// ===== Between the call and its handler =====

/// Holds a call's permit for both of them. To the call it is what its own permit ends at.
pub(super) struct Slot {
    state: Mutex<State>,
    /// Of a limit further out.
    outer: Option<Held>,
}

struct State {
    permit: Permit,
    holder: Holder,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Call,
    Both,
    Handler,
    Nobody,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holder(&self) -> Holder {
        self.lock().holder
    }

    /// Returns the token of the lent permit, with the clock of the call permit.
    fn inner_token(lent: &Permit, token: Token) -> Token {
        Token { clock: token.clock, ..lent.token() }
    }

    /// One of the two has gone, and `rest` would hold it on.
    fn leave(&self, rest: Holder, outcome: Outcome, clock: UpstreamClock) {
        let mut state = self.lock();
        if state.holder == Holder::Both {
            state.holder = rest;
            return;
        }
        state.holder = Holder::Nobody;
        let mut permit = state.permit.take();
        // Whoever gets in by it is woken outside of the lock.
        drop(state);
        permit.replace_clock(clock);
        permit.finish(outcome);
    }
}

impl Finish for Slot {
    fn finish(&self, token: Token, outcome: Outcome) {
        self.leave(Holder::Handler, outcome, token.clock);
    }

    fn head(&self, token: &mut Token, so_far: Outcome) {
        // Algorithms, wakers and subscribers run in `Permit::head`, so the permit is taken out of the lock. Only the
        // call releases it before the end of the call, and the call is in here.
        let permit = self.lock().permit.take();
        let mut lent = LentPermit { slot: self, permit };
        lent.permit.replace_clock(token.clock);
        // The permit of the call has already attributed a certain outcome.
        lent.permit.head(so_far, false);
        token.clock = lent.permit.token().clock;
    }

    fn hold(&self) -> Hold {
        self.lock().permit.hold()
    }

    fn measures(&self) -> Measures {
        self.lock().permit.giver().map_or(Measures::Nothing, |giver| giver.measures())
    }

    fn count_cancelled_after(&self) -> Option<Duration> {
        self.lock().permit.giver()?.count_cancelled_after()
    }

    fn follows_reader(&self, token: Token) -> bool {
        let permit = &self.lock().permit;
        permit.giver().is_some_and(|giver| giver.follows_reader(Self::inner_token(permit, token)))
    }

    fn waits_for(&self, token: Token, what: WaitsFor) {
        let permit = &self.lock().permit;
        if let Some(giver) = permit.giver() {
            giver.waits_for(Self::inner_token(permit, token), what);
        }
    }
}

/// The permit of a slot, out of its lock. Drop puts it back into the slot, also during a panic.
struct LentPermit<'a> {
    slot: &'a Slot,
    permit: Permit,
}

impl Drop for LentPermit<'_> {
    fn drop(&mut self) {
        let permit = self.permit.take();
        let hollow = mem::replace(&mut self.slot.lock().permit, permit);
        drop(hollow);
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let holder = self.holder();
        f.debug_struct("Slot").field("holder", &holder).finish_non_exhaustive()
    }
}

// ===== Beside how calls are judged =====

/// A protocol that lends each call's place to its handler, made by
/// [`upgrades`](crate::ConcurrencyLimitLayer::upgrades).
#[derive(Clone, Copy, Debug, Default)]
pub struct Upgrades<M>(pub(super) M);

/// What is remembered of a call that may be upgraded.
#[derive(Debug)]
pub struct Lent<C> {
    call: C,
    call_permit: CallPermit,
}

/// The permit that measures the call while the handler may hold the lent permit. It releases the lent permit at its
/// end.
#[derive(Debug)]
struct CallPermit {
    permit: Permit,
    mark: Option<SentMark>,
}

impl CallPermit {
    fn set_clock(&mut self) {
        if let Some(mark) = self.mark.take() {
            self.permit.set_clock(&mark);
        }
    }
}

impl Drop for CallPermit {
    fn drop(&mut self) {
        self.set_clock();
    }
}

impl<M, ReqB, Res, E> Judge<Request<ReqB>, Res, E> for Upgrades<M>
where
    M: Judge<Request<ReqB>, Res, E>,
{
    type Response = M::Response;
    type Call = Lent<M::Call>;

    fn deadline(&self, request: &Request<ReqB>) -> Option<Deadline> {
        self.0.deadline(request)
    }

    fn sent_mark(&self, request: &Request<ReqB>) -> Option<SentMark> {
        self.0.sent_mark(request)
    }

    fn health_call(&self, request: &Request<ReqB>) -> Option<HealthCall> {
        self.0.health_call(request)
    }

    fn begin<G: Giver>(
        &self,
        request: &mut Request<ReqB>,
        permit: impl FnOnce() -> Permit<G>,
    ) -> Lent<M::Call> {
        let deadline = CallerDeadline::of(self.deadline(request));
        // Only one of the two has use for it.
        let call = self.0.begin(request, Permit::<G>::hollow);
        let mark = self.sent_mark(request);
        let permit = permit().observing(deadline, mark.is_some()).erase();
        let slot = Shared::new(Slot {
            state: Mutex::new(State { permit, holder: Holder::Call }),
            outer: request.extensions_mut().remove(),
        });
        let permit = slot.permit(Token::default()).with_record_of(&slot.lock().permit).erase();
        request.extensions_mut().insert(Held(slot));
        Lent { call, call_permit: CallPermit { permit, mark } }
    }

    fn call_permit(lent: &mut Lent<M::Call>) -> Option<&mut Permit> {
        Some(&mut lent.call_permit.permit)
    }

    fn wrap(response: Res) -> M::Response {
        M::wrap(response)
    }

    fn judge<G: Giver>(
        mut lent: Lent<M::Call>,
        result: Result<&mut M::Response, &E>,
        _taken_at_the_beginning: &mut Permit<G>,
    ) {
        lent.call_permit.set_clock();
        M::judge(lent.call, result, &mut lent.call_permit.permit);
    }
}
