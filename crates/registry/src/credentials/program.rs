//! Programs that are asked for credentials: what they may cost, and that nothing of them stays.

use std::io;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

use super::HelperProblem;

/// What a program said in the end.
pub(super) struct Said {
    pub(super) status: ExitStatus,
    pub(super) output: Vec<u8>,
}

impl Said {
    /// What it said if it did not fail.
    pub(super) fn success(self) -> Result<Vec<u8>, HelperProblem> {
        match self.status.code() {
            Some(0) => Ok(self.output),
            Some(code) => Err(HelperProblem::Status(code)),
            None => Err(HelperProblem::Killed),
        }
    }
}

/// Runs a program that gets `input` and has to end within `limit`. What it writes to standard error, in
/// which there may be secrets, is not kept.
///
/// # Cancellation
/// The program, and whatever it started in its process group, is killed then, as it is when it takes
/// or says too much.
pub(super) async fn run(
    command: &mut Command,
    input: &[u8],
    limit: Duration,
) -> Result<Said, HelperProblem> {
    let child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(HelperProblem::Run)?;
    let talk = Running(child).talk(input);
    tokio::time::timeout(limit, talk).await.unwrap_or(Err(HelperProblem::Timeout(limit)))
}

/// A program that is killed with all its children if it is not waited for.
struct Running(Child);

impl Running {
    async fn talk(mut self, input: &[u8]) -> Result<Said, HelperProblem> {
        let mut output = Vec::new();
        let (stdin, stdout) = (self.0.stdin.take(), self.0.stdout.take());
        let write = async {
            let Some(mut stdin) = stdin else { return Ok(()) };
            match stdin.write_all(input).await {
                // One that knows without asking need not read.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                written => written,
            }
        };
        let read = async {
            let Some(stdout) = stdout else { return Ok(0) };
            stdout.take(MAX_BYTES + 1).read_to_end(&mut output).await
        };
        // Both at once: it may answer before it has read everything.
        let (_, read) = tokio::try_join!(write, read).map_err(HelperProblem::Run)?;
        if u64::try_from(read).unwrap_or(u64::MAX) > MAX_BYTES {
            return Err(HelperProblem::TooMuch);
        }
        let status = self.0.wait().await.map_err(HelperProblem::Run)?;
        Ok(Said { status, output })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nothing is there any more of one that was waited for. Of any other the process is, as a zombie
        // at least, so that its number is nobody else's.
        let pid = self.0.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(Err(error)) = pid.map(|pid| kill_process_group(pid, Signal::KILL)) {
            tracing::debug!(%error, "the processes of a credential helper cannot be killed");
        }
    }
}

/// As Docker limits it.
const MAX_BYTES: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn a_program_is_given_the_question_and_its_answer_is_returned() {
        for (script, input, expected) in [
            ("cat", &b"hello"[..], &b"hello"[..]),
            ("echo known", b"hello", b"known\n"),
            ("exec <&-; echo late", &[7; 1 << 20], b"late\n"),
            ("cat >/dev/null; echo secret >&2", b"", b""),
        ] {
            let said = run(&mut shell(script), input, LONG).await.unwrap();
            assert_eq!(said.success().unwrap(), expected, "{script}");
        }
        let status = |script: &'static str| async move {
            run(&mut shell(script), b"", LONG).await.unwrap().success().unwrap_err()
        };
        assert!(matches!(status("exit 3").await, HelperProblem::Status(3)));
        assert!(matches!(status("kill -KILL $$").await, HelperProblem::Killed));
        let missing = run(&mut Command::new("/nowhere/plugin"), b"", LONG).await;
        assert!(matches!(missing, Err(HelperProblem::Run(_))));
    }

    #[tokio::test]
    async fn a_flood_is_cut_off() {
        let flood = run(&mut shell("exec cat /dev/zero"), b"", LONG).await;
        assert!(matches!(flood, Err(HelperProblem::TooMuch)));
    }

    /// A child of the program holds the pipe that is read to its end.
    #[tokio::test]
    async fn one_that_takes_too_long_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().await.unwrap().success());
        let script = format!("sleep 1000 >{} & wait", pipe.display());
        let opened = tokio::task::spawn_blocking(move || File::open(pipe).unwrap());
        let run = run(&mut shell(&script), b"", Duration::from_millis(200)).await;
        assert!(matches!(run, Err(HelperProblem::Timeout(_))));
        let mut file = opened.await.unwrap();
        let ended = tokio::task::spawn_blocking(move || file.read(&mut [0]).unwrap());
        assert_eq!(ended.await.unwrap(), 0);
    }
}
