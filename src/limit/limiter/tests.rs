use super::*;
use crate::{
    limit::{partition::CallClass, queue::QueueOrder},
    outcome::HealthCall,
};

#[test]
fn word_is_recycled_with_the_last_call() {
    let word = LimitWord::default();
    let has_permits = [word.try_acquire(|| 2), word.try_acquire(|| 2), word.try_acquire(|| 2)];
    assert_eq!(has_permits, [Some(1), Some(2), None]);
    assert!(!word.abandon());
    assert_eq!(word.release(), AfterRelease::Nothing);
    assert_eq!(word.release(), AfterRelease::Recycle);
}

#[test]
fn word_without_calls_is_recycled_at_once() {
    assert!(LimitWord::default().abandon());
}

#[test]
fn limiter_does_not_inherit_settings_of_former_owner_of_its_slot() {
    let slot = |limiter: &Limiter| {
        let word = limiter.word();
        let counts = [limiter.in_flight(), limiter.waiting()];
        (counts, word.releases_at_head(), word.readers.max(), limiter.has_room())
    };
    let expected = ([0, 0], false, None, true);
    for _ in 0..3 {
        let limiter = Limiter::new(1, None);
        assert_eq!(slot(&limiter), expected);
        limiter.set_release_at_head(true);
        limiter.set_max_unread(Some(Duration::from_secs(1)));
        let call = limiter.try_acquire().unwrap();
        limiter.release(call);
    }
}

#[test]
fn fork_has_the_settings_and_no_calls() {
    let limiter = Limiter::new(1, None);
    limiter.set_queue(3, Duration::from_secs(1));
    limiter.set_order(QueueOrder::Lifo);
    limiter.set_retry_after(Duration::from_secs(9));
    limiter.set_release_at_head(true);
    limiter.set_max_unread(Some(Duration::from_secs(4)));
    limiter.set_exempts_health(false);
    limiter.set_shares(&[0.5, 0.25]);
    limiter.set_reject_by_priority(true);
    limiter.set_name("first");
    limiter.set_in_use();
    let _ = limiter.reject(RejectedKind::Full);
    let call = limiter.acquire(CallClass::default().partition(0));
    assert!(matches!(call, Ok(Acquisition::Admitted(_))));

    let fork = limiter.fork().unwrap();
    let settings = |limiter: &Limiter| {
        let word = limiter.word();
        let queue = limiter.lock();
        (
            (limiter.limit(), limiter.max_queue(), limiter.max_wait(), limiter.retry_after()),
            (word.releases_at_head(), word.readers.max()),
            (limiter.exempts_health.load(Ordering::Relaxed), limiter.is_shadow()),
            (limiter.is_partitioned.load(Ordering::Relaxed), queue.shares.ratios()),
            (queue.threshold.is_some(), limiter.label.get().cloned()),
        )
    };
    assert_eq!(format!("{:?}", settings(&fork)), format!("{:?}", settings(&limiter)));
    assert_eq!(
        (fork.in_flight(), fork.rejected(RejectedKind::Full), fork.is_in_use()),
        (0, 0, false)
    );
    assert_eq!(fork.partitions()[0].1, 0);
}

#[test]
fn health_calls_are_exempt_up_to_maximum_of_their_kind() {
    let limiter = Limiter::new(1, None);
    let kinds = [
        (HealthCall::Check, MAX_HEALTH_CHECKS as usize),
        (HealthCall::Watch, MAX_HEALTH_WATCHES as usize),
    ];
    let mut all = Vec::new();
    for (kind, max) in kinds {
        let mut calls: Vec<_> = (0..max).map_while(|_| limiter.admit_health_call(kind)).collect();
        assert_eq!(calls.len(), max, "{kind:?}");
        assert!(limiter.admit_health_call(kind).is_none(), "{kind:?}");
        limiter.release(calls.pop().unwrap());
        calls.extend(limiter.admit_health_call(kind));
        assert!(limiter.admit_health_call(kind).is_none(), "{kind:?}");
        assert_eq!(calls.len(), max, "{kind:?}");
        all.extend(calls);
    }
    assert!(limiter.try_acquire().is_some(), "no health call needs the permit");
    all.into_iter().for_each(|call| limiter.release(call));
    assert_eq!(limiter.exempt().1, 0);
    limiter.set_exempts_health(false);
    assert!(limiter.admit_health_call(HealthCall::Check).is_none());
}
