//! The log of the upstream.

use std::collections::{HashMap, HashSet};

pub struct AccessLog {
    times: HashMap<String, usize>,
    connections: HashSet<(String, String)>,
    most_on_one: usize,
}

impl AccessLog {
    /// Parses lines of the form `method id status process connection requests-on-it`.
    pub fn read(log: &str) -> Self {
        let mut this = Self { times: HashMap::new(), connections: HashSet::new(), most_on_one: 0 };
        for line in log.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let [_method, id, _status, process, connection, requests] = fields[..] else {
                panic!("incomplete line: {line:?}");
            };
            *this.times.entry(id.to_owned()).or_default() += 1;
            this.connections.insert((process.to_owned(), connection.to_owned()));
            this.most_on_one = this.most_on_one.max(requests.parse().unwrap());
        }
        this
    }

    /// Returns how many times the upstream received the request with this id.
    pub fn times(&self, id: &str) -> usize {
        self.times.get(id).copied().unwrap_or(0)
    }

    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    pub fn most_on_one(&self) -> usize {
        self.most_on_one
    }
}
