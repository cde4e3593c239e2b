//! A server that has its limits.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::StatusCode;
use tokio::{sync::oneshot, time::sleep};

use crate::world::{Upstream, status};

/// How long a piece of work takes, around its mean.
#[derive(Clone, Copy, Debug)]
pub enum Spread {
    /// From half of it to one and a half.
    Even,
    Exponential,
}

/// So many workers, each with one call at a time; what finds none of them free stands in one line. What was
/// begun, or stands in the line, is worked on, whether its caller has left or not.
#[derive(Clone)]
pub struct Server(Arc<Mutex<Room>>);

struct Room {
    workers: usize,
    busy: usize,
    line: VecDeque<oneshot::Sender<()>>,
    mean: Duration,
    spread: Spread,
    dice: fastrand::Rng,
}

impl Server {
    pub fn new(workers: usize, mean: Duration, spread: Spread) -> Self {
        let dice = fastrand::Rng::with_seed(3);
        let line = VecDeque::new();
        Self(Arc::new(Mutex::new(Room { workers, busy: 0, line, mean, spread, dice })))
    }

    pub fn upstream(&self) -> Upstream {
        let server = self.clone();
        Upstream::new(move || {
            let (done, served) = oneshot::channel();
            server.0.lock().expect("nobody panics").line.push_back(done);
            server.work();
            async {
                let _ = served.await;
                status(StatusCode::OK)
            }
        })
    }

    pub fn set_workers(&self, workers: usize) {
        self.0.lock().expect("nobody panics").workers = workers;
        self.work();
    }

    fn work(&self) {
        let mut room = self.0.lock().expect("nobody panics");
        while room.busy < room.workers {
            let Some(done) = room.line.pop_front() else { return };
            room.busy += 1;
            let random = room.dice.f64();
            let takes = room.mean.mul_f64(match room.spread {
                Spread::Even => 0.5 + random,
                Spread::Exponential => -(1.0 - random).ln(),
            });
            let server = self.clone();
            tokio::spawn(async move {
                sleep(takes).await;
                let _ = done.send(());
                server.0.lock().expect("nobody panics").busy -= 1;
                server.work();
            });
        }
    }
}
