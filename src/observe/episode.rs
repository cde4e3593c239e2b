//! Episodes of repeated events: periods in which events of one kind repeat, such as the rejections of a layer for one
//! reason. The episode of a circuit is in `breaker/machine/`.

use crate::time::Nanos;

/// The time without an event after which an episode is over, and the minimum time between two summaries.
pub(super) const INTERVAL: Nanos = 10_000_000_000;

/// A period of repeated events. It begins with the first event and ends 10 s after the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Episode {
    began: Nanos,
    /// The time of the last sample with events.
    last: Nanos,
    /// The time of the last summary.
    reported: Nanos,
    /// The number of events since the last summary.
    unreported: u64,
    total: u64,
}

/// A report of an episode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Summary {
    /// `count` events have occurred in the time `within`. `is_first` is true for the first summary of an episode.
    Occurred { count: u64, within: Nanos, is_first: bool },
    /// The episode is over. `count` is the number of all its events.
    Ended { count: u64, lasted: Nanos },
}

impl Episode {
    /// Records the number of events between `since` and `now`, which is the time between two samples. The first events
    /// are reported at once, later ones at most once in 10 s. The counts of all summaries of an episode add up to the
    /// number of its events.
    pub(super) fn record(
        episode: &mut Option<Self>,
        count: u64,
        since: Nanos,
        now: Nanos,
    ) -> Option<Summary> {
        let Some(now_on) = episode else {
            if count == 0 {
                return None;
            }
            *episode =
                Some(Self { began: since, last: now, reported: now, unreported: 0, total: count });
            let within = now.saturating_sub(since);
            return Some(Summary::Occurred { count, within, is_first: true });
        };
        now_on.total = now_on.total.saturating_add(count);
        now_on.unreported = now_on.unreported.saturating_add(count);
        if count > 0 {
            now_on.last = now;
        }
        let within = now.saturating_sub(now_on.reported);
        if now_on.unreported > 0 && within >= INTERVAL {
            let count = std::mem::take(&mut now_on.unreported);
            now_on.reported = now;
            return Some(Summary::Occurred { count, within, is_first: false });
        }
        if now_on.unreported == 0 && now.saturating_sub(now_on.last) >= INTERVAL {
            let (count, lasted) = (now_on.total, now_on.last.saturating_sub(now_on.began));
            *episode = None;
            return Some(Summary::Ended { count, lasted });
        }
        None
    }

    /// Returns the number of all events of the episode.
    pub(super) const fn total(&self) -> u64 {
        self.total
    }

    /// Returns the time since the beginning of the episode.
    pub(super) const fn age(&self, now: Nanos) -> Nanos {
        now.saturating_sub(self.began)
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Nanos = 1_000_000_000;

    /// Records one count each second.
    fn summaries(counts: &[u64]) -> Vec<(u64, Summary)> {
        let mut episode = None;
        let seconds = (1..).zip(counts);
        let record = |(second, count): (u64, &u64)| {
            let now = second * SECOND;
            Episode::record(&mut episode, *count, now - SECOND, now).map(|made| (second, made))
        };
        seconds.filter_map(record).collect()
    }

    #[test]
    fn five_seconds_of_events_are_two_summaries_and_one_end() {
        let mut counts = vec![2000; 5];
        counts.extend([0; 20]);
        let occurred = |count, within, is_first| Summary::Occurred {
            count,
            within: within * SECOND,
            is_first,
        };
        assert_eq!(
            summaries(&counts),
            [
                (1, occurred(2000, 1, true)),
                (11, occurred(8000, 10, false)),
                (15, Summary::Ended { count: 10_000, lasted: 5 * SECOND }),
            ]
        );
    }

    proptest! {
        #[test]
        fn counts_add_up_and_summaries_are_ten_seconds_apart(
            counts in proptest::collection::vec(prop_oneof![3 => Just(0u64), 1 => 1u64..1000], 0..100)
        ) {
            let mut all = counts.clone();
            all.extend([0; 30]);
            let (mut reported, mut of_episode, mut last) = (0, 0, None::<u64>);
            for (second, summary) in summaries(&all) {
                match summary {
                    Summary::Occurred { count, is_first, .. } => {
                        prop_assert!(count > 0);
                        prop_assert_eq!(is_first, last.is_none());
                        prop_assert!(last.is_none_or(|last| second - last >= 10));
                        reported += count;
                        of_episode += count;
                        last = Some(second);
                    }
                    Summary::Ended { count, .. } => {
                        prop_assert_eq!(count, of_episode);
                        (of_episode, last) = (0, None);
                    }
                }
            }
            prop_assert_eq!(reported, counts.iter().sum::<u64>());
            prop_assert_eq!(last, None);
        }
    }
}
