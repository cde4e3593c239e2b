//! One run of both sides at the same time, with the same clock. Each side has an upstream of its own.

use std::{io, sync::Arc, time::Duration};

use crate::{
    clients::{Guards, bare_client, protected_client},
    live::{self, History},
    load,
    script::Clock,
    tally::{Call, Tally},
    upstream::{Meter, Upstream},
};

/// One of the two sides.
#[derive(Debug)]
pub struct Side {
    pub tally: Arc<Tally>,
    pub meter: Arc<Meter>,
    /// All calls of the side. Empty until the run has ended.
    pub calls: Vec<Call>,
}

#[derive(Debug)]
pub struct Run {
    pub bare: Side,
    pub protected: Side,
    pub guards: Guards,
    pub history: History,
}

pub async fn run() -> io::Result<Run> {
    let clock = Clock::starting_in(Duration::from_millis(200));
    let (bare_upstream, mut bare) = side(clock).await?;
    let (protected_upstream, mut protected) = side(clock).await?;

    let client = bare_client::<load::Body>(clock, bare.tally.clone());
    let (protected_client, guards) =
        protected_client(clock, protected_upstream.addr, protected.tally.clone());
    let url = |upstream: &Upstream| format!("http://{}/", upstream.addr);
    let drives = [
        tokio::spawn(load::drive(client, url(&bare_upstream), clock, bare.tally.clone())),
        tokio::spawn(load::drive(
            protected_client,
            url(&protected_upstream),
            clock,
            protected.tally.clone(),
        )),
    ];
    let history = live::watch(&bare, &protected, &guards, clock).await;
    for drive in drives {
        drive.await.map_err(io::Error::other)?;
    }
    bare_upstream.stop().await?;
    protected_upstream.stop().await?;
    for side in [&mut bare, &mut protected] {
        side.calls = side.tally.calls();
    }
    Ok(Run { bare, protected, guards, history })
}

async fn side(clock: Clock) -> io::Result<(Upstream, Side)> {
    let upstream = Upstream::start(clock).await?;
    let meter = upstream.meter.clone();
    Ok((upstream, Side { tally: Arc::default(), meter, calls: Vec::new() }))
}
