//! Streams of server-sent events.
//!
//! A stream makes its next frame when the server polls its body. So a stream with a slow reader holds at most one frame,
//! and continues with the newest sample.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::{Instant, Sleep, sleep_until};

use super::feed::{Feed, FeedSample};
use crate::{
    observe::{
        registry::{Registry, WatchedLayers},
        visit::Stopping,
    },
    permit::DataStream,
};

/// The maximum number of open streams of a registry. A browser opens at most six connections to a host over HTTP/1.
const MAX_STREAMS: usize = 16;

/// The time between two comments, which keep a proxy from closing a connection without events.
const PING_INTERVAL: Duration = Duration::from_secs(15);

/// Counts as one open stream of a registry until it is dropped.
pub(super) struct OpenStream(Arc<WatchedLayers>);

impl OpenStream {
    /// Returns `None` if the maximum number of streams is open, or if the process is *stopping*.
    pub(super) fn open(registry: &Registry) -> Option<Self> {
        if let Some(mut stopping) = stopping(registry) {
            if stopping.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
                return None;
            }
        }
        let layers = registry.layers();
        let add = |open: usize| (open < MAX_STREAMS).then_some(open + 1);
        layers.streams.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).ok()?;
        Some(Self(layers.clone()))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Returns a future that resolves when the process is *stopping*. `None` if the registry watches no lifecycle.
fn stopping(registry: &Registry) -> Option<Stopping> {
    registry.layers().all().iter().find_map(|watched| watched.state.upgrade()?.stopping())
}

/// The data of one stream.
pub(super) struct EventStream {
    feed: Arc<Feed>,
    /// The last sample that was sent. `None` before the first frame.
    sent: Option<Arc<FeedSample>>,
    /// The number of the last decision that was sent.
    sent_decision: u64,
    next_ping: Instant,
    timer: Pin<Box<Sleep>>,
    /// Resolves when the process is *stopping*.
    stopping: Option<Stopping>,
    _open: OpenStream,
}

impl EventStream {
    /// Returns a stream that continues after the decision with the number `last_event_id`, if the client has sent one.
    pub(super) fn new(feed: &Arc<Feed>, open: OpenStream, last_event_id: Option<u64>) -> Self {
        let now = Instant::now();
        Self {
            feed: feed.clone(),
            sent: None,
            sent_decision: last_event_id.unwrap_or(u64::MAX),
            next_ping: now + PING_INTERVAL,
            timer: Box::pin(sleep_until(now)),
            stopping: None,
            _open: open,
        }
    }

    /// Returns the next frame, or `None` if there is no newer sample.
    fn frame(&mut self, now: Instant) -> Option<Bytes> {
        let sample = self.feed.sample(now);
        self.timer.as_mut().reset(sample.next_at);
        let mut frame = String::new();
        let tick = match &self.sent {
            None => {
                // The time until the browser connects again.
                frame.push_str("retry: 1000\n\n");
                frame.push_str(&self.feed.snapshot(&sample));
                // The snapshot contains the last decisions. A client that continues needs those that it has missed. A
                // number above the last one is from an earlier process.
                if self.sent_decision != u64::MAX {
                    let is_known = self.sent_decision <= sample.last_decision();
                    let after = if is_known { self.sent_decision } else { 0 };
                    sample.write_decisions(after, &mut frame);
                }
                None
            }
            Some(sent) if !sample.is_newer_than(sent) => return None,
            Some(sent) => {
                sample.write_decisions(self.sent_decision, &mut frame);
                let tick = sample.tick_after(sent).cloned();
                if tick.is_none() {
                    frame.push_str(&self.feed.snapshot(&sample));
                }
                tick
            }
        };
        self.sent_decision = sample.last_decision();
        self.sent = Some(sample);
        if now >= self.next_ping {
            self.next_ping = now + PING_INTERVAL;
            frame.push_str(": ping\n\n");
        }
        match tick {
            Some(tick) if frame.is_empty() => Some(tick),
            Some(tick) => Some([frame.as_bytes(), &tick].concat().into()),
            None => Some(frame.into()),
        }
    }
}

impl DataStream for EventStream {
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            // A lifecycle may be watched after the stream was opened.
            if self.stopping.is_none() {
                self.stopping = stopping(&self.feed.registry);
            }
            if let Some(stopping) = &mut self.stopping {
                if stopping.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(None);
                }
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if let Some(frame) = self.frame(Instant::now()) {
                return Poll::Ready(Some(frame));
            }
        }
    }
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}
