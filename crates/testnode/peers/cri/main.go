// The calls by which a kubelet pulls an image and runs a Pod of one container, for tests.
//
//	cri pull IMAGE
//	cri run IMAGE                      prints what the container prints
//	cri run IMAGE VOLUME COMMAND...    the same with the image VOLUME mounted on /volume
//	cri rmi IMAGE
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const socket = "unix:///run/containerd/containerd.sock"

type client struct {
	images  cri.ImageServiceClient
	runtime cri.RuntimeServiceClient
	pod     *cri.PodSandboxConfig
}

// The Pod uses the node's network, so that no plugin is needed for it.
func podConfig(logs string) *cri.PodSandboxConfig {
	id := strconv.Itoa(os.Getpid())
	network := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "pod-" + id, Namespace: "default", Uid: id},
		LogDirectory: logs,
		Linux: &cri.LinuxPodSandboxConfig{
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: network},
		},
	}
}

func (c *client) pull(ctx context.Context, image string) error {
	request := &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}, SandboxConfig: c.pod}
	_, err := c.images.PullImage(ctx, request)
	return err
}

func (c *client) remove(ctx context.Context, image string) error {
	_, err := c.images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: image}})
	return err
}

func (c *client) run(ctx context.Context, image, volume string, command ...string) (err error) {
	sandbox, err := c.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: c.pod})
	if err != nil {
		return fmt.Errorf("starting the sandbox: %w", err)
	}
	id := sandbox.PodSandboxId
	defer func() {
		_, stopped := c.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
		_, removed := c.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
		err = errors.Join(err, stopped, removed)
	}()
	config := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "container"},
		Image:    &cri.ImageSpec{Image: image},
		Command:  command,
		LogPath:  "container.log",
		Linux:    &cri.LinuxContainerConfig{},
	}
	if volume != "" {
		config.Mounts = []*cri.Mount{{
			ContainerPath: "/volume", Readonly: true, Image: &cri.ImageSpec{Image: volume},
		}}
	}
	create := &cri.CreateContainerRequest{PodSandboxId: id, Config: config, SandboxConfig: c.pod}
	created, err := c.runtime.CreateContainer(ctx, create)
	if err != nil {
		return fmt.Errorf("creating the container: %w", err)
	}
	container := created.ContainerId
	if _, err := c.runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: container}); err != nil {
		return fmt.Errorf("starting the container: %w", err)
	}
	for state := cri.ContainerState_CONTAINER_RUNNING; state != cri.ContainerState_CONTAINER_EXITED; {
		time.Sleep(10 * time.Millisecond)
		status, err := c.runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: container})
		if err != nil {
			return fmt.Errorf("looking at the container: %w", err)
		}
		state = status.Status.State
	}
	return c.printLog()
}

// Each line of the log begins with a time, a stream and a tag.
func (c *client) printLog() error {
	log, err := os.ReadFile(filepath.Join(c.pod.LogDirectory, "container.log"))
	for _, line := range strings.Split(strings.TrimSpace(string(log)), "\n") {
		if fields := strings.SplitN(line, " ", 4); len(fields) == 4 {
			fmt.Println(fields[3])
		}
	}
	return err
}

func do(args []string) error {
	options := grpc.WithTransportCredentials(insecure.NewCredentials())
	conn, err := grpc.NewClient(socket, options)
	if err != nil {
		return err
	}
	logs, err := os.MkdirTemp("", "cri-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(logs)
	c := &client{cri.NewImageServiceClient(conn), cri.NewRuntimeServiceClient(conn), podConfig(logs)}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	switch {
	case len(args) == 2 && args[0] == "pull":
		return c.pull(ctx, args[1])
	case len(args) == 2 && args[0] == "rmi":
		return c.remove(ctx, args[1])
	case len(args) == 2 && args[0] == "run":
		return c.run(ctx, args[1], "")
	case len(args) > 3 && args[0] == "run":
		return c.run(ctx, args[1], args[2], args[3:]...)
	}
	return errors.New("what should be done?")
}

func main() {
	if err := do(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "cri:", err)
		os.Exit(1)
	}
}
