//! A simulated server with a fixed number of workers.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::StatusCode;
use tokio::{sync::oneshot, time::sleep};

use crate::world::{Upstream, status};

/// The distribution of the service time around its mean.
#[derive(Clone, Copy, Debug)]
pub enum Spread {
    /// Uniform, from half of the mean to one and a half times the mean.
    Even,
    Exponential,
}

/// Workers that handle one call at a time, and one unbounded queue in front of them. The server works on every call
/// that has arrived, even after its caller has given up.
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
            server.0.lock().expect("not poisoned").line.push_back(done);
            server.work();
            async {
                let _ = served.await;
                status(StatusCode::OK)
            }
        })
    }

    pub fn set_workers(&self, workers: usize) {
        self.0.lock().expect("not poisoned").workers = workers;
        self.work();
    }

    fn work(&self) {
        let mut room = self.0.lock().expect("not poisoned");
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
                server.0.lock().expect("not poisoned").busy -= 1;
                server.work();
            });
        }
    }
}
