// The calls by which a kubelet pulls an image and runs a Pod of one container, for tests.
//
//	cri pull IMAGE
//	cri run IMAGE                      prints what the container prints
//	cri run IMAGE VOLUME COMMAND...    the same with the image VOLUME mounted on /volume
//	cri rmi IMAGE
//	cri images VERSION                 prints what is said of all images, in v1 or v1alpha2
//
// With -endpoint images are asked for there, as a kubelet does with --image-service-endpoint; with -auth
// USER:PASSWORD, or -token for an identity token, they are pulled with these credentials. With -root UID a Pod
// has a user namespace whose root is this user outside, as with `hostUsers: false`; it needs a CNI plugin then.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const socket = "unix:///run/containerd/containerd.sock"

var (
	endpoint = flag.String("endpoint", socket, "where images are asked for")
	auth     = flag.String("auth", "", "user and password to pull with")
	token    = flag.String("token", "", "identity token to pull with")
	root     = flag.Uint("root", 0, "who root of the Pod's user namespace is outside")
)

type client struct {
	conn    *grpc.ClientConn
	images  cri.ImageServiceClient
	runtime cri.RuntimeServiceClient
	pod     *cri.PodSandboxConfig
}

// As many ids as a kubelet gives to a Pod.
func mappings() []*cri.IDMapping {
	if *root == 0 {
		return nil
	}
	return []*cri.IDMapping{{HostId: uint32(*root), Length: 65536}}
}

// The Pod uses the node's network, so that no plugin is needed for it, unless it has a user namespace: whose
// that is not, it cannot show.
func namespaces() *cri.NamespaceOption {
	ids := mappings()
	if ids == nil {
		return &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}
	}
	users := &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: ids, Gids: ids}
	return &cri.NamespaceOption{UsernsOptions: users}
}

func podConfig(logs string) *cri.PodSandboxConfig {
	id := strconv.Itoa(os.Getpid())
	return &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "pod-" + id, Namespace: "default", Uid: id},
		LogDirectory: logs,
		Linux: &cri.LinuxPodSandboxConfig{
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: namespaces()},
		},
	}
}

func (c *client) pull(ctx context.Context, image string) error {
	request := &cri.PullImageRequest{Image: &cri.ImageSpec{Image: image}, SandboxConfig: c.pod}
	if *auth != "" || *token != "" {
		user, password, _ := strings.Cut(*auth, ":")
		request.Auth = &cri.AuthConfig{Username: user, Password: password, IdentityToken: *token}
	}
	_, err := c.images.PullImage(ctx, request)
	return err
}

func (c *client) remove(ctx context.Context, image string) error {
	_, err := c.images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: image}})
	return err
}

// Both versions have the same messages. What changes from call to call is left out.
func (c *client) show(ctx context.Context, version string) error {
	service := "/runtime." + version + ".ImageService/"
	list := &cri.ListImagesResponse{}
	if err := c.conn.Invoke(ctx, service+"ListImages", &cri.ListImagesRequest{}, list); err != nil {
		return err
	}
	sort.Slice(list.Images, func(i, j int) bool { return list.Images[i].Id < list.Images[j].Id })
	for _, image := range list.Images {
		status := &cri.ImageStatusResponse{}
		request := &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: image.Id}, Verbose: true}
		if err := c.conn.Invoke(ctx, service+"ImageStatus", request, status); err != nil {
			return err
		}
		fmt.Println(image, status.Image, status.Info["info"])
	}
	disk := &cri.ImageFsInfoResponse{}
	if err := c.conn.Invoke(ctx, service+"ImageFsInfo", &cri.ImageFsInfoRequest{}, disk); err != nil {
		return err
	}
	for _, usage := range append(disk.ImageFilesystems, disk.ContainerFilesystems...) {
		usage.Timestamp = 0
		fmt.Println(usage)
	}
	fmt.Println(c.conn.Invoke(ctx, service+"NobodyKnowsThis", &cri.ImageFsInfoRequest{}, disk))
	return c.stream(ctx)
}

// Newer versions of containerd send images one by one; the others say that they do not.
func (c *client) stream(ctx context.Context) error {
	stream, err := c.images.StreamImages(ctx, &cri.StreamImagesRequest{})
	if err != nil {
		return err
	}
	var lines []string
	for {
		next, err := stream.Recv()
		if err != nil {
			sort.Strings(lines)
			fmt.Println(strings.Join(lines, "\n"))
			if err != io.EOF {
				fmt.Println(err)
			}
			return nil
		}
		lines = append(lines, next.String())
	}
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
		Linux: &cri.LinuxContainerConfig{
			SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: namespaces()},
		},
	}
	if volume != "" {
		config.Mounts = []*cri.Mount{{
			ContainerPath: "/volume", Readonly: true, Image: &cri.ImageSpec{Image: volume},
			UidMappings: mappings(), GidMappings: mappings(),
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
	forImages, err := grpc.NewClient(*endpoint, options)
	if err != nil {
		return err
	}
	logs, err := os.MkdirTemp("", "cri-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(logs)
	images := cri.NewImageServiceClient(forImages)
	c := &client{forImages, images, cri.NewRuntimeServiceClient(conn), podConfig(logs)}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	switch {
	case len(args) == 2 && args[0] == "pull":
		return c.pull(ctx, args[1])
	case len(args) == 2 && args[0] == "images":
		return c.show(ctx, args[1])
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
	flag.Parse()
	if err := do(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "cri:", err)
		os.Exit(1)
	}
}
