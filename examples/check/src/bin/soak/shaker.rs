//! A task that changes settings and states all the time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::{BoxError, Timeouts, breaker::CircuitState};
use fastrand::Rng;
use tokio::time::sleep;

use crate::{
    clients::{self, Guards},
    server::{LARGEST, Server},
};

pub async fn shake(server: Server, clients: Vec<Guards>, mut random: Rng, over: Arc<AtomicBool>) {
    while !over.load(SeqCst) {
        let pause = Duration::from_millis(random.u64(1..20));
        let client = &clients[random.usize(..clients.len())];
        // Held until the end of the pause.
        let mut held = Vec::new();
        let mut isolation = None;
        let changed: Result<(), BoxError> = match random.u8(..14) {
            0 => server.limit.set_limit(random.usize(1..=LARGEST)).map_err(Into::into),
            1 => client.limit.set_limit(random.usize(1..64)).map_err(Into::into),
            2 => client
                .limit
                .set_queue(random.usize(..64), Duration::from_millis(random.u64(1..80)))
                .map_err(Into::into),
            3 => client.connections.set_max_per_host(random.usize(1..24)).map_err(Into::into),
            4 => client.connections.set_max_total(random.usize(1..24)).map_err(Into::into),
            5 => client.timeout.set(short(&mut random)).map_err(Into::into),
            6 => client
                .deadline
                .set_default(Duration::from_millis(random.u64(5..400)))
                .map_err(Into::into),
            7 => {
                client.breaker.force_open();
                Ok(())
            }
            8 => {
                client.breaker.half_open();
                Ok(())
            }
            9 => {
                client.breaker.set_shadow(random.bool());
                Ok(())
            }
            10 => {
                isolation = Some(client.breaker.isolate());
                Ok(())
            }
            11 => {
                client.connections.recycle();
                Ok(())
            }
            12 => {
                server.is_sick.store(true, SeqCst);
                Ok(())
            }
            _ => {
                let limit = if random.bool() { &server.limit } else { &client.limit };
                held.extend((0..random.usize(..16)).map_while(|_| limit.try_acquire().ok()));
                Ok(())
            }
        };
        changed.expect("valid settings");
        sleep(pause).await;
        drop((held, isolation));
        server.is_sick.store(false, SeqCst);
        if client.breaker.state() == CircuitState::ForcedOpen {
            client.breaker.reset();
        }
        if random.u8(..8) == 0 {
            client.restore().expect("the initial settings are valid");
        }
    }
}

fn short(random: &mut Rng) -> Timeouts {
    let mut some = || Duration::from_millis(random.u64(1..100));
    clients::timeouts().head(some()).response_idle(some()).first_frame(some())
}
