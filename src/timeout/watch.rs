use std::{sync::Arc, task::Context};

use tokio::time::Instant;

use super::{
    sending::{Sending, Stage},
    settings::{State, Timeouts},
};
use crate::call::{Far, Form, LayerKind, Phase};

/// The times of one call, and what they count from.
#[derive(Debug)]
pub struct Watch {
    pub(super) timeouts: Timeouts,
    /// When all of it has to be over, and what says so.
    pub(super) end: Option<(Instant, Phase)>,
    begun: bool,
    pub(super) by: LayerKind,
    pub(super) form: Form,
    pub(super) far: Far<State>,
}

/// What a call does next while it waits.
pub(super) enum Next {
    /// It goes on waiting, up to here. Final: nothing that happens will change that.
    Until { at: Instant, phase: Phase, is_final: bool },
    /// For ever.
    Forever,
    /// Its request body fell silent.
    Stalled,
}

impl Watch {
    #[inline]
    pub(super) fn new(timeouts: Timeouts, by: LayerKind, form: Form, far: Far<State>) -> Self {
        Self { timeouts, end: None, begun: false, by, form, far }
    }

    /// The caller's deadline. False if it has passed.
    pub(super) fn bound(&mut self, deadline: Instant) -> bool {
        self.end = Some((deadline, Phase::Deadline));
        deadline > Instant::now()
    }

    /// What is over, if it is the caller's deadline.
    pub(super) fn is_over(&self) -> Option<Phase> {
        let deadline = self.end.filter(|(_, phase)| *phase == Phase::Deadline);
        deadline.filter(|(at, _)| *at <= Instant::now()).map(|(_, phase)| phase)
    }

    /// The time of the whole runs from here: the first wait, or the head.
    pub(super) fn begin(&mut self) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let Some(total) = self.timeouts.get(Phase::Total) else { return };
        if let Some(at) = Instant::now().checked_add(total) {
            if self.end.is_none_or(|(end, _)| at < end) {
                self.end = Some((at, Phase::Total));
            }
        }
    }

    /// The head is not here yet.
    #[inline]
    pub(super) fn wait(&mut self, sending: Option<&Arc<Sending>>, cx: &mut Context<'_>) -> Next {
        self.begin();
        let taking = self.timeouts.get(Phase::Taking);
        let (stage, due) = sending.map_or((Stage::Sent, None), |sending| sending.poll(taking, cx));
        let (at, phase) = match stage {
            Stage::Stalled => return Next::Stalled,
            Stage::Sending => match (due, self.end) {
                (None, None) => return Next::Forever,
                (Some(due), Some((end, _))) if due < end => (due, Phase::Taking),
                (_, Some(end)) => end,
                (Some(due), None) => (due, Phase::Taking),
            },
            // It has been sent just now: from here on the head is waited for.
            Stage::Sent | Stage::Answered => {
                let head = self.timeouts.get(Phase::Head);
                let head = head.and_then(|limit| Instant::now().checked_add(limit));
                match (head, self.end) {
                    (None, None) => return Next::Forever,
                    (Some(head), Some((end, _))) if head < end => (head, Phase::Head),
                    (_, Some(end)) => end,
                    (Some(head), None) => (head, Phase::Head),
                }
            }
        };
        Next::Until { at, phase, is_final: stage != Stage::Sending }
    }
}
