//! A man in the middle of a QMP connection: writes down every command, and makes one of them go
//! wrong on demand.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use super::tools::temp_dir;

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// QEMU never sees the command; the answer is this error.
    Refuse(String),
    /// QEMU carries the command out; the answer is this error all the same.
    FailAfter(String),
    /// This command and all later ones vanish, until [`QmpFault::disarm`].
    Hang,
    /// QEMU sees the command, and all later ones, that much later.
    Slow(Duration),
    /// The connection is closed instead of an answer; QEMU does not see the command.
    Close,
}

#[derive(Debug, Clone)]
enum When {
    /// When that many more commands have passed.
    After(usize),
    /// At the next command of this name.
    Named(String),
}

#[derive(Default)]
struct Plan {
    seen: Vec<Value>,
    armed: Option<(When, Fault)>,
    hanging: bool,
    fired: bool,
}

impl Plan {
    /// Notes a command; says what is to happen to it.
    fn command(&mut self, command: &Value) -> Option<Fault> {
        self.seen.push(command.clone());
        if self.hanging {
            return Some(Fault::Hang);
        }
        let (when, _) = self.armed.as_mut()?;
        let now = match when {
            When::After(0) => true,
            When::After(left) => {
                *left -= 1;
                false
            }
            When::Named(name) => command["execute"] == *name,
        };
        if !now {
            return None;
        }
        let (_, fault) = self.armed.take()?;
        self.fired = true;
        self.hanging = fault == Fault::Hang;
        Some(fault)
    }
}

/// The man in the middle. As many clients as come are let through, each with a connection of its
/// own to QEMU, who then greets one at a time as ever.
pub struct QmpFault {
    dir: tempfile::TempDir,
    plan: Arc<Mutex<Plan>>,
}

impl QmpFault {
    /// Stands before the monitor at `real`.
    pub fn start(real: &Path) -> Self {
        let dir = temp_dir();
        let listener = UnixListener::bind(dir.path().join("qmp.sock")).unwrap();
        let plan = Arc::new(Mutex::new(Plan::default()));
        let (real, shared) = (real.to_owned(), Arc::clone(&plan));
        // Ends with the test's process: accept has nobody to wake it.
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                // A QEMU that is gone: the client sees its connection closed.
                if let Ok(server) = UnixStream::connect(&real) {
                    connection(client, server, &shared);
                }
            }
        });
        Self { dir, plan }
    }

    /// Where to connect instead of the real monitor.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("qmp.sock")
    }

    fn plan(&self) -> std::sync::MutexGuard<'_, Plan> {
        self.plan.lock().unwrap()
    }

    /// Lets the n-th command from now on go wrong; 0 is the next one.
    pub fn arm(&self, n: usize, fault: Fault) {
        let mut plan = self.plan();
        plan.armed = Some((When::After(n), fault));
        plan.fired = false;
    }

    /// Lets the next command of that name go wrong.
    pub fn arm_named(&self, name: &str, fault: Fault) {
        let mut plan = self.plan();
        plan.armed = Some((When::Named(name.into()), fault));
        plan.fired = false;
    }

    /// Nothing goes wrong any more.
    pub fn disarm(&self) {
        let mut plan = self.plan();
        plan.armed = None;
        plan.hanging = false;
    }

    /// Did it go wrong since it was armed? When not, the n was larger than the commands are many.
    pub fn fired(&self) -> bool {
        self.plan().fired
    }

    /// The commands seen since the last call, in order, with their arguments.
    pub fn take(&self) -> Vec<Value> {
        std::mem::take(&mut self.plan().seen)
    }

    /// The names of the commands seen since the last [`take`](Self::take).
    pub fn commands(&self) -> Vec<String> {
        let name = |c: &Value| c["execute"].as_str().unwrap_or("?").to_owned();
        self.plan().seen.iter().map(name).collect()
    }
}

fn send(to: &Mutex<UnixStream>, message: &Value) {
    // The client may be gone; then there is nobody to tell.
    let _ = to
        .lock()
        .unwrap()
        .write_all(format!("{message}\r\n").as_bytes());
}

fn error(id: &Value, why: &str) -> Value {
    let mut answer = json!({"error": {"class": "GenericError", "desc": why}});
    if !id.is_null() {
        answer["id"] = id.clone();
    }
    answer
}

fn connection(client: UnixStream, mut server: UnixStream, plan: &Arc<Mutex<Plan>>) {
    let to_client = Arc::new(Mutex::new(client.try_clone().unwrap()));
    // Answers to be replaced: the commands' ids and the errors' texts.
    let replace: Arc<Mutex<Vec<(Value, String)>>> = Arc::default();

    let (answers, answer_to, replacing) = (
        server.try_clone().unwrap(),
        Arc::clone(&to_client),
        Arc::clone(&replace),
    );
    std::thread::spawn(move || {
        for line in BufReader::new(answers).lines().map_while(Result::ok) {
            let Ok(mut message) = serde_json::from_str::<Value>(&line) else {
                break;
            };
            if message.get("return").is_some() || message.get("error").is_some() {
                let mut replacing = replacing.lock().unwrap();
                let id = message.get("id").cloned().unwrap_or_default();
                if let Some(at) = replacing.iter().position(|(i, _)| *i == id) {
                    message = error(&id, &replacing.remove(at).1);
                }
            }
            send(&answer_to, &message);
        }
        let _ = answer_to.lock().unwrap().shutdown(Shutdown::Both);
    });

    let plan = Arc::clone(plan);
    std::thread::spawn(move || {
        let commands = serde_json::Deserializer::from_reader(&client).into_iter::<Value>();
        for command in commands.map_while(Result::ok) {
            let id = command.get("id").cloned().unwrap_or_default();
            let fault = plan.lock().unwrap().command(&command);
            match fault {
                Some(Fault::Refuse(why)) => {
                    send(&to_client, &error(&id, &why));
                    continue;
                }
                Some(Fault::Hang) => continue,
                Some(Fault::Close) => break,
                Some(Fault::Slow(delay)) => std::thread::sleep(delay),
                Some(Fault::FailAfter(why)) => replace.lock().unwrap().push((id, why)),
                None => {}
            }
            if server.write_all(format!("{command}\n").as_bytes()).is_err() {
                break;
            }
        }
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    });
}
