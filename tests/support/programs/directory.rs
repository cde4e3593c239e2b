//! Temporary directories of servers.

use std::{
    env, fs, io,
    path::PathBuf,
    process,
    sync::atomic::{AtomicUsize, Ordering},
};

/// A new directory below the system's temporary directory. Dropping it deletes the directory with its content.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn create(name: &str) -> io::Result<Self> {
        static CREATED: AtomicUsize = AtomicUsize::new(0);
        let (process, n) = (process::id(), CREATED.fetch_add(1, Ordering::Relaxed));
        let path = env::temp_dir().join(format!("buttress-{name}-{process}-{n}"));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
