//! The upstream that replaces nginx. It closes idle connections after a time and on a reload, and keeps a log.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::timeout,
};

use super::{KEEPALIVE, Upstream};

#[derive(Default)]
struct Shared {
    log: Mutex<String>,
    connections: AtomicUsize,
    /// The latest generation whose reload is complete: no connection of an earlier generation is open.
    reloaded: AtomicUsize,
}

pub struct Embedded {
    addr: SocketAddr,
    shared: Arc<Shared>,
    /// The current generation. Dropping the sender ends the upstream.
    generation: watch::Sender<usize>,
    thread: thread::JoinHandle<()>,
}

impl Embedded {
    /// Starts the upstream on a thread of its own, so that it runs while the thread of the client is blocked.
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let addr = listener.local_addr().unwrap();
        let (generation, seen) = watch::channel(0);
        let shared = Arc::<Shared>::default();
        let thread = thread::spawn({
            let shared = shared.clone();
            move || {
                let runtime =
                    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(serve(listener, shared, seen));
            }
        });
        Self { addr, shared, generation, thread }
    }
}

impl Upstream for Embedded {
    fn port(&self) -> u16 {
        self.addr.port()
    }

    fn reload(&self) {
        self.generation.send_modify(|generation| *generation += 1);
    }

    fn is_reloaded(&self) -> bool {
        self.shared.reloaded.load(Ordering::SeqCst) == *self.generation.borrow()
    }

    fn log(self: Box<Self>) -> String {
        let Self { shared, generation, thread, .. } = *self;
        drop(generation);
        thread.join().unwrap();
        let mut log = shared.log.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *log)
    }
}

async fn serve(
    listener: std::net::TcpListener,
    shared: Arc<Shared>,
    mut generation: watch::Receiver<usize>,
) {
    let listener = TcpListener::from_std(listener).unwrap();
    let mut open = JoinSet::new();
    let (mut now, mut old) = (0, 0);
    loop {
        if old == 0 {
            shared.reloaded.store(now, Ordering::SeqCst);
        }
        tokio::select! {
            accepted = listener.accept() => {
                let number = shared.connections.fetch_add(1, Ordering::SeqCst);
                let (tcp, young) = (accepted.unwrap().0, generation.clone());
                let born = now;
                let connection = connection(tcp, number, shared.clone(), young);
                open.spawn(async move {
                    connection.await;
                    born
                });
            }
            changed = generation.changed() => {
                if changed.is_err() {
                    break;
                }
                (now, old) = (*generation.borrow_and_update(), open.len());
            }
            Some(born) = open.join_next() => {
                old -= usize::from(born.unwrap() < now);
            }
        }
    }
    open.join_all().await;
}

/// Serves a connection until the client closes it, it has been idle for [`KEEPALIVE`], or its generation ends.
async fn connection(
    mut tcp: TcpStream,
    number: usize,
    shared: Arc<Shared>,
    mut generation: watch::Receiver<usize>,
) {
    tcp.set_nodelay(true).unwrap();
    for requests in 1.. {
        let request = tokio::select! {
            biased;
            _ = generation.changed() => return,
            request = timeout(KEEPALIVE, read(&mut tcp)) => request,
        };
        let Ok(Ok(head)) = request else { return };
        let mut words = head.split(' ');
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let id = head.lines().find_map(|line| line.strip_prefix("x-id: ")).unwrap();
        let cut = path == "/cut";
        let status = if cut { 444 } else { 200 };
        shared
            .log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_str(&format!("{method} {id} {status} 0 {number} {requests}\n"));
        if cut || tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await.is_err()
        {
            return;
        }
    }
}

/// Reads the next request with its body. Returns the head.
async fn read(tcp: &mut TcpStream) -> io::Result<String> {
    let mut bytes = Vec::new();
    loop {
        let read = tcp.read_buf(&mut bytes).await?;
        if read == 0 || bytes.len() > 4096 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.map_or(0, |length| length.trim().parse().unwrap());
        if bytes.len() >= end + 4 + length {
            return Ok(head);
        }
    }
}
