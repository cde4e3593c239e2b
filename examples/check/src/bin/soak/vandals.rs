//! Vandals: clients that send incomplete or invalid HTTP and disconnect.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use fastrand::Rng;
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::TcpStream,
    time::{sleep, timeout},
};

use crate::tally::Tally;

const SAID: [&[u8]; 9] = [
    b"",
    b"GET / HTTP/1.1\r\nhos",
    b"GET /stream/7 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET /slow/9 HTTP/1.1\r\nhost: x\r\n\r\nGET /stream/9 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\nhalf of it",
    b"PUT /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\nff\r\nhal",
    b"PUT /echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03 no HTTP at all\r\n\r\n",
];

pub async fn rage(server: SocketAddr, mut random: Rng, tally: Arc<Tally>, over: Arc<AtomicBool>) {
    while !over.load(SeqCst) {
        let what = SAID[random.usize(..SAID.len())];
        match once(server, what, &mut random).await {
            Ok(()) => tally.count("vandalised"),
            Err(_) => tally.count("vandals cut off"),
        }
        sleep(Duration::from_millis(random.u64(..10))).await;
    }
}

async fn once(server: SocketAddr, what: &[u8], random: &mut Rng) -> io::Result<()> {
    let mut tcp = TcpStream::connect(server).await?;
    tcp.write_all(what).await?;
    // If a response has arrived and is not read, closing the socket sends a reset.
    if random.bool() {
        let readable = tcp.ready(Interest::READABLE);
        let _ = timeout(Duration::from_millis(random.u64(..50)), readable).await;
    }
    Ok(())
}
