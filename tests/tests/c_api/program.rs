//! C programs: compiled by the system's compiler against the header and the shared library, and run.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use corelane_tests::BOUND;

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

pub(crate) fn include() -> PathBuf {
    root().join("plugin/capi/include")
}

/// Where this test's own binary lies: `TARGET/PROFILE`.
fn profile_folder() -> PathBuf {
    std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned()
}

/// The folder of `libcorelane.so`: the one named by who has built it with all else, as `tests/run.sh` does; or it is built here, of the
/// profile of this test. With other features of its dependencies than the tests had, this can take a minute.
pub(crate) fn library() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        if let Some(folder) = std::env::var_os("CORELANE_TEST_LIBRARIES") {
            let folder = PathBuf::from(folder);
            assert!(folder.join("libcorelane.so").exists(), "no library in {}", folder.display());
            return folder;
        }
        let folder = profile_folder();
        let profile = match folder.file_name().unwrap().to_str().unwrap() {
            "debug" => "dev",
            profile => profile,
        };
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
        let output = Command::new(cargo)
            .current_dir(root())
            .args(["build", "--quiet", "--package", "corelane-capi-shared", "--profile", profile])
            .arg("--target-dir")
            .arg(folder.parent().unwrap())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(folder.join("libcorelane.so").exists(), "no library in {}", folder.display());
        folder
    })
}

/// A folder for one test's files, removed at its end.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new(name: &str) -> Self {
        let name = format!("corelane-c-api-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A compiler, a language, and the warnings that must not come.
#[derive(Clone, Copy)]
pub(crate) struct Compiler {
    pub(crate) command: &'static str,
    pub(crate) language: &'static [&'static str],
}

pub(crate) const C11: Compiler = Compiler { command: "cc", language: &["-std=c11"] };

impl Compiler {
    /// Runs the compiler; panics with its words if there are any.
    #[track_caller]
    pub(crate) fn run(self, arguments: &[&Path]) {
        let output = Command::new(self.command)
            .args(self.language)
            .args(["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O1", "-g"])
            .arg("-I")
            .arg(include())
            .args(arguments)
            .output()
            .unwrap_or_else(|error| panic!("{}: {error}", self.command));
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && words.is_empty(), "{:?}: {words}", self.language);
    }

    /// Compiles a source to a program that finds the library where it is.
    #[track_caller]
    pub(crate) fn build(self, source: &Path, folder: &Folder) -> PathBuf {
        let library = library();
        let program = folder.0.join(source.file_stem().unwrap());
        let path = format!("-Wl,-rpath,{}", library.display());
        let search = format!("-L{}", library.display());
        let flags: [&Path; 8] = [
            source,
            "-o".as_ref(),
            &program,
            search.as_ref(),
            "-lcorelane".as_ref(),
            path.as_ref(),
            "-Wl,--no-undefined".as_ref(),
            "-pthread".as_ref(),
        ];
        self.run(&flags);
        program
    }
}

/// Runs a program within the bound. `CORELANE_...` variables are only those given.
#[track_caller]
pub(crate) fn execute(program: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CORELANE_") {
            command.env_remove(name);
        }
    }
    let child = command
        .args(arguments)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let id = child.id();
    let output = std::thread::spawn(move || child.wait_with_output().unwrap());
    let start = Instant::now();
    while !output.is_finished() {
        if start.elapsed() > BOUND {
            // SAFETY: our own child, which nobody has waited for: `output` still does.
            unsafe { libc::kill(id as i32, libc::SIGKILL) };
            let output = output.join().unwrap();
            panic!("{} hangs: {output:?}", program.display());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    output.join().unwrap()
}

/// What a program wrote to standard output and standard error.
pub(crate) fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}
