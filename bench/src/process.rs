//! Children of the coordinator: this executable again, in another role, over pipes with one JSON value per line.
//! Every wait is bounded, and no child outlives its parent.

use std::io::BufReader;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::getppid;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control;

/// The option by which a child learns whom to die with.
pub(crate) const PARENT_OPTION: &str = "--parent-pid";

/// Makes the kernel kill this process when its parent dies. Called by children, first thing.
pub(crate) fn die_with(parent: i32) -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("PR_SET_PDEATHSIG")?;
    // The parent may have died before the line above; then nobody will send the signal.
    if getppid().as_raw() != parent {
        bail!("the parent process {parent} is gone");
    }
    Ok(())
}

/// A child process that speaks lines of `T`.
pub(crate) struct Helper<T> {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<Result<Option<T>>>,
}

impl<T: DeserializeOwned + Send + 'static> Helper<T> {
    /// Starts this executable with `arguments`. Its errors go to our standard error.
    pub(crate) fn start(name: &str, arguments: &[String]) -> Result<Self> {
        Self::start_with(name, arguments, &[])
    }

    /// Starts this executable with `arguments`, its environment being ours with `environment` on top.
    pub(crate) fn start_with(
        name: &str,
        arguments: &[String],
        environment: &[(String, String)],
    ) -> Result<Self> {
        // The link rather than the path it shows: it works even when the file was replaced by a newer build meanwhile.
        let mut child = Command::new("/proc/self/exe")
            .arg0("corelane-bench")
            .args(arguments)
            .args([PARENT_OPTION, &std::process::id().to_string()])
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting the {name} process"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("the child's standard output")?;
        let (sender, lines) = channel();
        let reader = move || {
            let mut stdout = BufReader::new(stdout);
            loop {
                let line = control::read_line(&mut stdout);
                let last = !matches!(line, Ok(Some(_)));
                if sender.send(line).is_err() || last {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name(format!("{name}-lines"))
            .spawn(reader)
            .context("starting a thread that reads a child's output")?;
        Ok(Self { name: name.to_owned(), child, stdin, lines })
    }

    /// The next line of the child; fails when it ends or says nothing within `patience`.
    pub(crate) fn receive(&mut self, patience: Duration) -> Result<T> {
        let line = self.receive_within(patience)?;
        line.with_context(|| {
            format!("the {} process did not answer within {} s", self.name, patience.as_secs())
        })
    }

    /// As [`Helper::receive`], but a child that says nothing within `patience` gives `None`.
    pub(crate) fn receive_within(&mut self, patience: Duration) -> Result<Option<T>> {
        match self.lines.recv_timeout(patience) {
            Ok(Ok(Some(value))) => Ok(Some(value)),
            Ok(Err(error)) => Err(error.context(format!("the {} process", self.name))),
            Ok(Ok(None)) | Err(RecvTimeoutError::Disconnected) => {
                let status = self.wait(Duration::from_secs(2));
                match status {
                    Some(status) => bail!("the {} process ended unexpectedly: {status}", self.name),
                    None => bail!("the {} process closed its output", self.name),
                }
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
        }
    }

    /// Sends one line to the child.
    pub(crate) fn send<U: Serialize>(&mut self, value: &U) -> Result<()> {
        let Some(stdin) = &mut self.stdin else {
            bail!("the {} process was told to end", self.name)
        };
        control::write_line(stdin, value).with_context(|| format!("to the {} process", self.name))
    }

    /// Sends a signal to the child.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, signal)
            .with_context(|| format!("sending {signal} to the {} process", self.name))
    }

    /// An error of the child's.
    pub(crate) fn blame(&self, message: String) -> anyhow::Error {
        anyhow::anyhow!("the {} process: {message}", self.name)
    }

    fn wait(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2))
                }
                _ => return None,
            }
        }
    }
}

impl<T> Drop for Helper<T> {
    fn drop(&mut self) {
        // The end of its input asks the child to end; one that does not is killed, and reaped either way.
        self.stdin = None;
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_real_parent_will_do() {
        // Not our own parent, so that the signal is armed for a process that then refuses to run.
        assert!(die_with(-1).is_err());
        prctl::set_pdeathsig(None).expect("disarmed");
    }
}
